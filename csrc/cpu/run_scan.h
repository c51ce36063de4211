// All threads' walk over the rows.
#pragma once

#include <vector>

#include "scanner.h"
#include "thread_pool.h"

namespace urm {

// Of all threads.
inline std::vector<Workspace> workspaces(const Group& group) {
  std::vector<Workspace> work;
  work.reserve(group.threads);
  for (int slot = 0; slot < group.threads; ++slot) work.emplace_back(group);
  return work;
}

// False when interrupted.
template <class Results>
bool run_scan(Group& group, std::vector<Workspace>& work, Results& results) {
  if (!group.packed.total || !group.request.items.rows) return true;
  run_parallel(group.threads, [&](int slot) { Scanner<Results>(group, work[slot], results, slot).run(); });
  if (ScanCounts* counts = group.request.counts) {
    counts->bytes += group.bytes.load();
    counts->survivors += group.survivors.load();
    counts->scored += group.scored.load();
    counts->cells += group.cells.load();
    counts->left_out += group.left_out.load();
  }
  return !group.stop.load();
}

}  // namespace urm
