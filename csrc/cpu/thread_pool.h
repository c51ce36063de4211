// Runs one function on several threads. Helpers are optional: work is handed out by the function itself (an atomic
// counter), so a region is complete when the caller and the helpers that did join have returned.
#pragma once

#include <functional>

namespace urm {

// Calls body(slot) on this thread with slot 0 and on up to threads - 1 pool threads with slots 1, 2, ...; returns when
// all calls have. Callers may overlap. Safe after fork: the child starts a pool of its own. `body` must not throw.
// Pool threads are in the default floating-point environment; the caller sees to its own.
void run_parallel(int threads, const std::function<void(int)>& body);

}  // namespace urm
