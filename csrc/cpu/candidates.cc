#include "candidates.h"

#include <algorithm>
#include <atomic>

#include "aligned.h"
#include "float_environment.h"
#include "thread_pool.h"

namespace urm {

void candidate_dots(const QueriesView& queries, const MatrixView& items, const int64_t* candidates, int64_t count,
                    int threads, const Kernels& kernels, float* out) {
  const DefaultFloatEnvironment environment;
  const int64_t padded = round_up(std::max<int64_t>(queries.r, 1), kLanes), m = queries.queries;
  const PackedQueries packed = pack_queries(queries, Reduce::kMax, 0, queries.users, padded);
  const int64_t tiles = (count + kLanes - 1) / kLanes, tasks = queries.users * tiles;
  threads = static_cast<int>(std::clamp<int64_t>(tasks * m / 64, 1, std::max(threads, 1)));
  const int64_t workspace = kLanes * (padded + m);
  AlignedVector<float> work(threads * workspace);
  std::atomic<int64_t> next{0};
  run_parallel(threads, [&](int slot) {
    float* rows = work.data() + slot * workspace;
    float* dots = rows + kLanes * padded;
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int64_t user = task / tiles, first = task % tiles * kLanes,
                    width = std::min<int64_t>(kLanes, count - first);
      kernels.gather(items, candidates + user * count + first, width, padded, rows);
      kernels.dots_of_rows(rows, padded, packed.rows.data() + user * m * padded, m, padded, Ahead{nullptr, 0}, dots);
      for (int64_t q = 0; q < m; ++q)
        std::copy(dots + q * kLanes, dots + q * kLanes + width, out + (user * m + q) * count + first);
    }
  });
}

}  // namespace urm
