// All threads' walk over the rows.
#pragma once

#include <vector>

#include "scanner.h"
#include "thread_pool.h"

namespace urm {

// False when interrupted.
template <class Results>
bool run_scan(Group& group, Results& results) {
  if (!group.packed.total || !group.request.items.rows) return true;
  std::vector<Workspace> work;
  work.reserve(group.threads);
  for (int slot = 0; slot < group.threads; ++slot) work.emplace_back(group);
  run_parallel(group.threads, [&](int slot) { Scanner<Results>(group, work[slot], results, slot).run(); });
  if (ScanCounts* counts = group.request.counts) {
    counts->bytes += group.bytes.load();
    counts->survivors += group.survivors.load();
    counts->scored += group.scored.load();
  }
  return !group.stop.load();
}

}  // namespace urm
