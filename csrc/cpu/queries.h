// A user's queries as the kernels want them: padded, non-existing ones left out, sums and means formed.
#pragma once

#include <cstdint>

#include "aligned.h"
#include "views.h"

namespace urm {

struct QueriesView {
  const float* data = nullptr;      // [users, queries, r], contiguous
  const uint8_t* exists = nullptr;  // [users, queries] or null: all
  int64_t users = 0;
  int64_t queries = 0;
  int64_t r = 0;
};

// Queries of users [first, last): `rows` [total, padded]; user u owns rows [start[u - first], start[u - first + 1]).
struct PackedQueries {
  AlignedVector<float> rows;
  AlignedVector<int64_t> start;
  int64_t total = 0;
};

PackedQueries pack_queries(const QueriesView& queries, Reduce reduce, int64_t first, int64_t last, int64_t padded);

}  // namespace urm
