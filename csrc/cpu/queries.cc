#include "queries.h"

#include <algorithm>

namespace urm {

PackedQueries pack_queries(const QueriesView& queries, Reduce reduce, int64_t first, int64_t last, int64_t padded) {
  const bool adds = reduce == Reduce::kSum || reduce == Reduce::kMean;
  const int64_t most = (last - first) * (adds ? 1 : queries.queries);
  PackedQueries packed;
  packed.rows.resize(most * padded);
  std::fill(packed.rows.begin(), packed.rows.end(), 0.0f);
  packed.start.push_back(0);
  for (int64_t user = first; user < last; ++user) {
    float* sum = packed.rows.data() + packed.total * padded;
    int64_t count = 0;
    for (int64_t m = 0; m < queries.queries; ++m) {
      if (queries.exists && !queries.exists[user * queries.queries + m]) continue;
      const float* query = queries.data + (user * queries.queries + m) * queries.r;
      float* row = adds ? sum : packed.rows.data() + packed.total * padded;
      for (int64_t e = 0; e < queries.r; ++e) row[e] = adds ? row[e] + query[e] : query[e];
      ++count;
      if (!adds) ++packed.total;
    }
    if (adds && count) {
      ++packed.total;
      if (reduce == Reduce::kMean)
        for (int64_t e = 0; e < queries.r; ++e) sum[e] /= static_cast<float>(count);
    }
    packed.start.push_back(packed.total);
  }
  return packed;
}

}  // namespace urm
