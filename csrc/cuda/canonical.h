// Canonical dots by half warps: lane j of a half keeps running sum j (csrc/common/canonical_dot.h), and the tree adds
// across lanes. The sums that a tree joins are the same from either side, so every lane may end with a result.
#pragma once

#include "../common/log_sum_exp.h"
#include "rows.h"
#include "warp.h"

namespace urm {

constexpr int kTileRows = 4, kTileQueries = 4;  // of a half warp: a dot for each of its lanes

static_assert(kLanes == kWarp / 2, "a half warp has a lane for every running sum");

// The dot of one row and one query, in all lanes of the half. The halves may ask for different ones.
__device__ inline float half_dot(const Table& table, int64_t row, const float* query) {
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t e = lane_of_warp() % kLanes; e < table.r; e += kLanes)
    sum = fused_multiply_add(element_of(table, row, e), __ldg(query + e), sum);
  for (int apart = kLanes / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
  return sum;
}

// A tree over the lanes of a half for as many dots, of each of which a lane has one running sum: each step halves the
// number that a lane keeps, and hands the others to the lane that it meets. Lane l ends with dot l.
template <int kApart>
__device__ __forceinline__ float dot_of_lane(float (&sums)[kLanes]) {
  const bool upper = lane_of_warp() & kApart;
#pragma unroll
  for (int i = 0; i < kApart; ++i) {
    const float keeps = upper ? sums[i + kApart] : sums[i], hands = upper ? sums[i] : sums[i + kApart];
    sums[i] = keeps + __shfl_xor_sync(kAllLanes, hands, kApart);
  }
  if constexpr (kApart > 1) return dot_of_lane<kApart / 2>(sums);
  return sums[0];
}

// By comparison, so that the array stays in registers.
template <class T>
__device__ __forceinline__ T one_of(const T (&four)[kTileRows], int i) {
  return i < 2 ? (i == 0 ? four[0] : four[1]) : (i == 2 ? four[2] : four[3]);
}

// The dots of four rows with four queries, `query_stride` apart; lane l of the half gets that of row l / 4 and query
// l % 4.
__device__ inline float tile_dot(const Table& table, const int64_t (&rows)[kTileRows], const float* queries,
                                 int64_t query_stride, int queries_left) {
  const int lane = lane_of_warp() % kLanes;
  float sums[kLanes] = {};
  for (int64_t e = lane; e < table.r; e += kLanes) {
    float q[kTileQueries];
#pragma unroll
    for (int j = 0; j < kTileQueries; ++j) q[j] = j < queries_left ? __ldg(queries + j * query_stride + e) : 0.0f;
#pragma unroll
    for (int i = 0; i < kTileRows; ++i) {
      const float x = element_of(table, rows[i], e);
#pragma unroll
      for (int j = 0; j < kTileQueries; ++j)
        sums[i * kTileQueries + j] = fused_multiply_add(x, q[j], sums[i * kTileQueries + j]);
    }
  }
  return dot_of_lane<kLanes / 2>(sums);
}

// The score that all of a row's dots have become.
__device__ inline float finished_score(const Table& table, int64_t row, float reduced) {
  if (table.bias.data) reduced += value_of(table.bias, row);
  return reduced + 0.0f;  // -0 becomes +0
}

__device__ inline float scaled_dot(const Table& table, int64_t row, float dot) {
  return table.row_scale.data ? dot * value_of(table.row_scale, row) : dot;
}

// Calls use(user, row, score) for every user from first_user to last_user and each of eight rows of a warp, four a
// half; rows that are not there (-1) are left out. All lanes of the warp are here; `use` is called by lanes that
// differ.
template <class Use>
__device__ void scores_of_rows(const Table& table, const Users& users, int64_t first_user, int64_t last_user,
                               const int64_t (&rows)[kTileRows], Use use) {
  const int lane = lane_of_warp() % kLanes, own = lane / kTileQueries;
  int64_t known[kTileRows];  // rows that can be read
#pragma unroll
  for (int i = 0; i < kTileRows; ++i) known[i] = rows[i] < 0 ? 0 : rows[i];
  const int64_t row = one_of(rows, own), known_row = row < 0 ? 0 : row;
  const int64_t places = users.places, r = table.r;
  if (places == 1) {  // users side by side
    for (int64_t user = first_user; user < last_user; user += kTileQueries) {
      const int left = static_cast<int>(last_user - user < kTileQueries ? last_user - user : kTileQueries);
      const float dot = tile_dot(table, known, users.queries + user * r, r, left);
      const int at = lane % kTileQueries;
      if (row >= 0 && at < left && users.count[user + at])
        use(user + at, row, finished_score(table, row, scaled_dot(table, row, dot)));
    }
    return;
  }
  for (int64_t user = first_user; user < last_user; ++user) {
    const float* queries = users.queries + user * places * r;
    const int count = users.count[user];
    const auto dot_at = [&](int m) {
      const float dot = tile_dot(table, known, queries + m * r, r, count - m);
      return scaled_dot(table, known_row, dot);
    };
    float most = -infinity();
    for (int m = 0; m < count; m += kTileQueries) {
      const float dot = dot_at(m);
      if (m + lane % kTileQueries < count) most = larger(dot, most);
    }
    for (int apart = 1; apart < kTileQueries; apart *= 2) most = larger(__shfl_xor_sync(kAllLanes, most, apart), most);
    if (users.log_sum_exp) {
      // Rows whose largest dot is infinite or NaN have it as their result, and add up what nobody looks at.
      SumOfExponentials sum{most, 0.0f, 0.0f};
      for (int m = 0; m < count; m += kTileQueries) {
        const float dot = dot_at(m);
        for (int j = 0; j < kTileQueries && m + j < count; ++j)
          sum.add(__shfl_sync(kAllLanes, dot, lane_of_warp() / kTileQueries * kTileQueries + j));
      }
      if (most - most == 0.0f) most = log_of(sum);
    }
    if (row >= 0 && count && lane % kTileQueries == 0) use(user, row, finished_score(table, row, most));
  }
}

}  // namespace urm
