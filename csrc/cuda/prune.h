// What a tile's sums rule out, for all users of a column group: pairs that may still win go to the warp's queue.
//
// A row survives for a user unless (docs/gpu_packed.md has the proof)
//
//   sum a + rho < limit - inverse bias - relative |limit - inverse bias|
#pragma once

#include "../common/log_sum_exp.h"
#include "tile.h"

namespace urm {

// The row's side of the bound: a, over what a sum's unit is, and rho = a (G E + L F + X n) with the largest
// coefficients of the column group.
struct RowTerms {
  float scale, rho, bias;
  float unused;
};

// Largest coefficients among the users of a column group, each over its user's step.
struct GroupSlack {
  float kept, lost, error;
};

// Of the row at a place. Codes in an order of their own have the table's bias beside them; a call's own is gathered.
__device__ __forceinline__ float bias_at(const Codes& codes, const Table& table, int64_t place) {
  if (codes.bias) return __ldg(codes.bias + place);
  return table.bias.data ? value_of(table.bias, row_at(codes, place)) : 0.0f;
}

// Terms of rows lane and 32 + lane of a tile, as they lie: loaded early, used late.
struct LoadedSides {
  float scale[kTileBlocks], bias[kTileBlocks];
  uint16_t lost[kTileBlocks], norm[kTileBlocks];
};

template <int kBits>
__device__ __forceinline__ LoadedSides load_sides(const Codes& codes, const Table& table, int64_t tile) {
  LoadedSides out;
  const int64_t r = table.r;
#pragma unroll
  for (int b = 0; b < kTileBlocks; ++b) {
    const int64_t wanted = tile * kTileBlocks + b, block = wanted < codes.count ? wanted : codes.count - 1;
    const unsigned char* side = codes.blocks + block * block_bytes(r, kBits) + block_code_bytes(r, kBits);
    out.scale[b] = __ldg(reinterpret_cast<const float*>(side) + lane_of_warp());
    out.lost[b] = __ldg(reinterpret_cast<const uint16_t*>(side + kBlockRows * 4) + lane_of_warp());
    out.norm[b] = __ldg(reinterpret_cast<const uint16_t*>(side + kBlockRows * 6) + lane_of_warp());
    out.bias[b] = bias_at(codes, table, block * kBlockRows + lane_of_warp());
  }
  return out;
}

template <int kBits>
__device__ __forceinline__ void write_terms(const LoadedSides& sides, const GroupSlack& slack, float lost_reference,
                                            float norm_reference, RowTerms* terms) {
#pragma unroll
  for (int b = 0; b < kTileBlocks; ++b) {
    const float e = widen_half(sides.lost[b]), n = widen_half(sides.norm[b]);
    float rho = slack.error * n;
    rho = fused_multiply_add(slack.kept, e > lost_reference ? e - lost_reference : 0.0f, rho);
    rho = fused_multiply_add(slack.lost, n > norm_reference ? n - norm_reference : 0.0f, rho);
    // Of a sum: those of high rows are kHigh times as large, and of 2 bits c + 3 is twice what is stored.
    const float unit =
        (kBits == 2 ? 2.0f : 1.0f) / static_cast<float>(lane_of_warp() >= kBlockRows / 2 ? kHigh<kBits> : 1);
    terms[b * kBlockRows + lane_of_warp()] = {sides.scale[b] * unit, sides.scale[b] * rho, sides.bias[b], 0.0f};
  }
}

// The user's side: see Limits.
struct UserLimit {
  float limit, inverse;
};

constexpr int kMostPairs = kRowsOfTile * kColumns;  // that one product's columns can leave
constexpr int kQueue = 2 * kMostPairs;

// A warp's survivors of one step over the columns: user of the group and row of the tile.
struct Queue {
  uint32_t* pairs;  // [kQueue]
  int size;

  __device__ __forceinline__ void push(bool survives, int user, int row) {
    const uint32_t votes = __ballot_sync(kAllLanes, survives);
    if (survives)
      pairs[size + __popc(votes & ((1u << lane_of_warp()) - 1))] = static_cast<uint32_t>(user * kRowsOfTile + row);
    size += __popc(votes);
  }
};

// What logsumexp may add to a bound, as a share of it.
__device__ inline float relative_excess(const Users& users) {
  float relative = 0.0f, offset;
  if (users.log_sum_exp) log_sum_exp_excess(users.places, &relative, &offset);
  return relative * 1.01f;
}

// Whether a bound over the user's step says that a score with this bias may reach the threshold. kGeneral: rows have a
// bias, or scores are those of logsumexp.
template <bool kGeneral>
__device__ __forceinline__ bool reaches(float bound, float bias, const UserLimit& user, float relative) {
  if constexpr (!kGeneral) return !(bound < user.limit);
  const float least = fused_multiply_add(-bias, user.inverse, user.limit);
  const float size = fabsf(least) < 0x1p127f ? fabsf(least) : 0x1p127f;  // or it would be no number less infinity
  return !(bound < fused_multiply_add(-relative, size, least));
}

__device__ __forceinline__ float bound_of_sum(int32_t sum, const RowTerms& row) {
  return fused_multiply_add(float_not_below(sum), row.scale, row.rho);
}

// Takes a tile's sums as tile.h hands them out: survivors go to the queue.
template <bool kGeneral>
struct Prune {
  const RowTerms* terms;   // [kRowsOfTile]
  const UserLimit* users;  // of the group, and as many more as share a product with the last, who can get nothing
  float relative;
  Queue* queue;

  __device__ __forceinline__ bool survives(int32_t sum, int row, int user) const {
    const RowTerms own = terms[row];
    return reaches<kGeneral>(bound_of_sum(sum, own), own.bias, users[user], relative);
  }

  // kCount pairs a lane, given by their number. Most have no survivor in the whole warp.
  template <int kCount, class Sum, class Row, class User>
  __device__ __forceinline__ void take(Sum sum, Row row, User user) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) any |= survives(sum(i), row(i), user(i));
    if (!__any_sync(kAllLanes, any)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) queue->push(survives(sum(i), row(i), user(i)), user(i), row(i));
  }
};

// Takes them likewise, and keeps every bound.
struct KeepBounds {
  const RowTerms* terms;
  float* bounds;        // [users, rows], of the group's users
  int64_t rows, first;  // of all tiles; of this one
  int users;

  template <int kCount, class Sum, class Row, class User>
  __device__ __forceinline__ void take(Sum sum, Row row, User user) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (user(i) < users && first + row(i) < rows)
        bounds[user(i) * rows + first + row(i)] = bound_of_sum(sum(i), terms[row(i)]);
  }
};

}  // namespace urm
