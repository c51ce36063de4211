// The scan of a packed table: integer products of codes on the tensor cores, an upper bound of every score from them,
// and for what may still win the exact score at once, by the same warp. Lists hold nothing but keys that reach the
// threshold.
//
// A warp takes 64 rows, two blocks of codes, and all queries of its column group. A load of 16 bytes has one quad of
// four neighbouring rows; it is at once an operand of four products, one for each of these rows (j = 0..3):
//
//   4 bits: lanes 4 g + t load quad t of rows 4 (g % 4) + j of block g / 4, and in the high halves of rows 16 + ...;
//   the
//           low halves are the operand's rows g, the high ones its rows g + 8. High halves are not shifted down: their
//           products are sixteen times as large, as their starts are.
//   8 bits: quad t of rows 4 g + j, of the first block for the operand's rows g, of the second for its rows g + 8.
//
// Quads 8 s + t and 8 s + 4 + t belong to step s. Which element a place of the operand has does not matter, as long as
// the queries' codes agree: fragments uint4 [columns / 8][steps / 2][lane] hold for two steps the two words of column
// lane / 4. Quads behind the last are the last one again, with codes of zero on the queries' side.
#pragma once

#include "rescore.h"

namespace urm {

constexpr int kTileBlocks = 2, kRowsOfTile = kTileBlocks * kBlockRows;
constexpr int kProducts = 4;  // of a step: the rows of a load
constexpr int kColumns = 8;   // of a product
constexpr int kScanThreads = 128;
constexpr int kScanBlocks = 2;                      // of a multiprocessor: their registers hold one tile and the next
constexpr int kMostPairs = kRowsOfTile * kColumns;  // that one product's columns can leave
constexpr int kQueue = 2 * kMostPairs;

// The row's side of the bound: a, and a (G e + F n + ...) with the largest coefficients of the column group.
struct RowTerms {
  float scale, rho, bias;
  float unused;
};

// Largest coefficients among the users of a column group, each over its user's step.
struct GroupSlack {
  float kept, lost, error;
};

// Place in the tile of the row whose sum is in register 2 `half` or 2 `half` + 1 of product j.
template <int kBits>
__device__ __forceinline__ int row_of_sum(int g, int j, int half) {
  return kBits == 4 ? kBlockRows * (g / 4) + kBlockRows / 2 * half + 4 * (g % 4) + j : kBlockRows * half + 4 * g + j;
}

template <int kBits>
constexpr int kLoads = kBits == 4 ? 2 : 4;  // of a step

// Loads of step s: quads 8 s + t (of both blocks in turns under 8 bits), then 8 s + 4 + t.
template <int kBits>
__device__ __forceinline__ void load_step(const Codes& codes, int64_t r, int64_t tile, int step, uint4* loads) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const int64_t last_quad = quads_of(r) - 1, last_block = codes.count - 1;
#pragma unroll
  for (int i = 0; i < kLoads<kBits>; ++i) {
    const int64_t which = kBits == 4 ? g / 4 : i % 2, high = kBits == 4 ? i : i / 2;
    const int64_t wanted = tile * kTileBlocks + which, quad = 8 * step + 4 * high + t;
    const int64_t block = wanted < last_block ? wanted : last_block;
    const int64_t place =
        (quad < last_quad ? quad : last_quad) * (kBits == 4 ? 64 : 128) + 16 * (kBits == 4 ? g % 4 : g);
    loads[i] = __ldg(reinterpret_cast<const uint4*>(codes.blocks + block * block_bytes(r, kBits) + place));
  }
}

template <int kBits>
__device__ __forceinline__ void operands_of(const uint4* loads, uint32_t (&a)[kProducts][4]) {
  const auto words = [](const uint4& x, uint32_t (&out)[4]) { out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w; };
  uint32_t from[4][4];
#pragma unroll
  for (int i = 0; i < kLoads<kBits>; ++i) words(loads[i], from[i]);
#pragma unroll
  for (int j = 0; j < kProducts; ++j) {
    if (kBits == 4) {
      a[j][0] = from[0][j] & 0x0F0F0F0Fu;
      a[j][1] = from[0][j] & 0xF0F0F0F0u;
      a[j][2] = from[1][j] & 0x0F0F0F0Fu;
      a[j][3] = from[1][j] & 0xF0F0F0F0u;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = from[i][j] ^ 0x80808080u;  // c, without its offset
    }
  }
}

// Terms of rows lane and 32 + lane of a tile, as they lie: loaded early, used late.
struct LoadedSides {
  float scale[kTileBlocks], bias[kTileBlocks];
  uint16_t lost[kTileBlocks], norm[kTileBlocks];
};

template <int kBits>
__device__ __forceinline__ LoadedSides load_sides(const ScanCall& call, int64_t tile) {
  LoadedSides out;
  const int64_t r = call.table.r;
#pragma unroll
  for (int b = 0; b < kTileBlocks; ++b) {
    const int64_t wanted = tile * kTileBlocks + b, block = wanted < call.codes.count ? wanted : call.codes.count - 1;
    const unsigned char* side = call.codes.blocks + block * block_bytes(r, kBits) + block_code_bytes(r, kBits);
    out.scale[b] = __ldg(reinterpret_cast<const float*>(side) + lane_of_warp());
    out.lost[b] = __ldg(reinterpret_cast<const uint16_t*>(side + kBlockRows * 4) + lane_of_warp());
    out.norm[b] = __ldg(reinterpret_cast<const uint16_t*>(side + kBlockRows * 6) + lane_of_warp());
    out.bias[b] = call.table.bias.data ? value_of(call.table.bias, block * kBlockRows + lane_of_warp()) : 0.0f;
  }
  return out;
}

__device__ __forceinline__ void write_terms(const LoadedSides& sides, const GroupSlack& slack, float lost_reference,
                                            float norm_reference, RowTerms* terms) {
#pragma unroll
  for (int b = 0; b < kTileBlocks; ++b) {
    const float e = value_of_half(sides.lost[b]), n = value_of_half(sides.norm[b]);
    float rho = slack.error * n;
    rho = fused_multiply_add(slack.kept, e > lost_reference ? e - lost_reference : 0.0f, rho);
    rho = fused_multiply_add(slack.lost, n > norm_reference ? n - norm_reference : 0.0f, rho);
    terms[b * kBlockRows + lane_of_warp()] = {sides.scale[b], sides.scale[b] * rho, sides.bias[b], 0.0f};
  }
}

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

// Rescores what the queue holds, two pairs at a time.
template <int kBits>
__device__ inline void rescore_queue(const ScanCall& call, int64_t first_user, int64_t tile, Queue& queue) {
  __syncwarp();
  const int half = lane_of_warp() / kLanes;
  for (int first = 0; first < queue.size; first += kWarp) {
    const int at = first + lane_of_warp();
    const uint32_t pair = at < queue.size ? queue.pairs[at] : 0;
    const int64_t user = first_user + pair / kRowsOfTile, row = tile * kRowsOfTile + pair % kRowsOfTile;
    const bool kept = at < queue.size && row < call.codes.count * kBlockRows && call.limits.wanted[user] > 0 &&
                      is_allowed(call.filter, user, row);
    uint32_t left = __ballot_sync(kAllLanes, kept);
    if (call.found.counts && lane_of_warp() == 0)
      atomicAdd(call.found.counts + 1, static_cast<unsigned long long>(__popc(left)));
    while (left) {
      const int one = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const int other = __ffs(static_cast<int>(left)) - 1;  // -1: none
      left &= left - 1;
      const int from = half ? other : one;
      const int64_t of_user = __shfl_sync(kAllLanes, user, from), of_row = __shfl_sync(kAllLanes, row, from);
      rescore_pairs<kBits>(call, from < 0 ? -1 : of_user, from < 0 ? -1 : of_row);
    }
  }
  queue.size = 0;
  __syncwarp();
}

// Bytes of shared memory: the group's columns (where kSteps > 0), their users' limits, every warp's terms and queue.
struct ScanShared {
  uint4* fragments;
  int2* starts;
  float *limit, *inverse, *relative;
  GroupSlack* slack;
  RowTerms* terms;
  uint32_t* queue;
};

// Programs: (as many as fill the device, column groups). A column group is group_users users, each with `width`
// columns: 1, 2, 4 or a multiple of 8. kSteps: 32 elements each, 2 or 4, whose codes stay in registers; 0: rows are
// longer, and codes are loaded again for every eight columns. kSingle: width is 1, and no sum is the largest of
// several.
template <int kBits, int kSteps, bool kSingle>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks) scan_codes(ScanCall call, int64_t group_users) {
  URM_DYNAMIC_SHARED(shared);
  const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
  const int64_t r = call.table.r, width = call.queries.width, pairs_of_steps = call.queries.step_pairs;
  const int64_t first_user = static_cast<int64_t>(blockIdx.y) * group_users;
  const int users = static_cast<int>(call.users.B - first_user < group_users ? call.users.B - first_user : group_users);
  const int64_t first_product = first_user * width / kColumns;
  const int products = static_cast<int>((users * width + kColumns - 1) / kColumns);
  const int of_user = width < kColumns ? 1 : static_cast<int>(width / kColumns);
  const int side_by_side = width < kColumns ? static_cast<int>(kColumns / width) : 1;  // users of a product

  unsigned char* place = shared;
  const auto take = [&](int64_t bytes) {
    unsigned char* taken = place;
    place += (bytes + 15) / 16 * 16;
    return taken;
  };
  const int64_t held = kSteps ? products * pairs_of_steps * kWarp : 0;
  uint4* fragments = reinterpret_cast<uint4*>(take(held * 16));
  int2* starts = reinterpret_cast<int2*>(take(kSteps ? products * 4 * 8 : 0));
  float* limit = reinterpret_cast<float*>(take(group_users * 4));
  float* inverse = reinterpret_cast<float*>(take(group_users * 4));
  GroupSlack* slack_place = reinterpret_cast<GroupSlack*>(take(sizeof(GroupSlack)));
  RowTerms* terms = reinterpret_cast<RowTerms*>(take(blockDim.x / kWarp * kRowsOfTile * sizeof(RowTerms))) +
                    warp_of_block() * kRowsOfTile;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(take(blockDim.x / kWarp * kQueue * 4)) + warp_of_block() * kQueue;

  const uint4* all_fragments =
      reinterpret_cast<const uint4*>(call.queries.fragments) + first_product * pairs_of_steps * kWarp;
  const int2* all_starts = reinterpret_cast<const int2*>(call.queries.starts) + first_product * 4;
  for (int64_t i = threadIdx.x; i < held; i += blockDim.x) fragments[i] = all_fragments[i];
  for (int i = threadIdx.x; kSteps && i < products * 4; i += blockDim.x) starts[i] = all_starts[i];
  for (int i = threadIdx.x; i < group_users; i += blockDim.x) {
    limit[i] = i < users ? call.limits.limit[first_user + i] : infinity();
    inverse[i] = i < users ? call.limits.inverse[first_user + i] : 0.0f;
  }
  if (threadIdx.x < kWarp) {
    GroupSlack most{0.0f, 0.0f, 0.0f};
    for (int i = lane; i < users; i += kWarp) {
      const int64_t user = first_user + i;
      if (call.queries.step[user] == 0.0f) continue;
      const float over = call.limits.inverse[user] * (1.0f + 0x1p-20f);
      const float kept = call.queries.kept_most[user], lost = call.queries.lost_most[user];
      most.kept = larger(kept * over, most.kept);
      most.lost = larger(lost * over, most.lost);
      most.error = larger(code_error(r, call.rotation_roundings) * (kept + lost) * over, most.error);
    }
    most = {largest_of_lanes(most.kept), largest_of_lanes(most.lost), largest_of_lanes(most.error)};
    if (lane == 0) *slack_place = most;
  }
  __syncthreads();
  const GroupSlack slack = *slack_place;
  const float lost_reference = usable_reference(call.codes.reference[0], r, kBits);
  const float norm_reference = usable_reference(call.codes.reference[1], r, kBits);
  float relative = 0.0f, offset;
  if (call.users.log_sum_exp) log_sum_exp_excess(call.users.places, &relative, &offset);
  relative *= 1.01f;

  Queue queue{pairs, 0};
  const auto survives = [&](int32_t sum, int row, int user) {
    const RowTerms own = terms[row];
    const float bound = fused_multiply_add(float_not_below(sum), own.scale, own.rho);
    const float least = fused_multiply_add(-own.bias, inverse[user], limit[user]);
    return !(bound < fused_multiply_add(-relative, fabsf(least), least));
  };

  constexpr int kHeld = kSteps ? kSteps : 1;
  const int64_t tiles = (call.codes.count + kTileBlocks - 1) / kTileBlocks;
  uint4 next[kHeld * kLoads<kBits>];
  LoadedSides next_sides;
  int64_t tile = warp_of_grid();
  const auto load_tile = [&](int64_t which) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load_step<kBits>(call.codes, r, which, s, next + s * kLoads<kBits>);
    next_sides = load_sides<kBits>(call, which);
  };
  const auto load_next = [&](int64_t which) { load_tile(which < tiles ? which : tiles - 1); };
  if (tile < tiles) load_tile(tile);
  int product = 0, user = 0;
  while (tile < tiles) {
    uint32_t a[kHeld][kProducts][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) operands_of<kBits>(next + s * kLoads<kBits>, a[s]);
    write_terms(next_sides, slack, lost_reference, norm_reference, terms);
    __syncwarp();
    const int64_t following = tile + warps_of_grid();
    load_next(following);

    for (; product < products && queue.size <= kQueue - kMostPairs; product += of_user, user += side_by_side) {
      int32_t largest[kProducts][2];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) largest[j][0] = largest[j][1] = -0x7FFFFFFF;
      int32_t sums[kProducts][4];
      for (int more = 0; more < of_user; ++more) {
        const int2 start = kSteps ? starts[(product + more) * 4 + t] : __ldg(all_starts + (product + more) * 4 + t);
        constexpr int kHigh = kBits == 4 ? 16 : 1;
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
          sums[j][0] = start.x, sums[j][1] = start.y;
          sums[j][2] = start.x * kHigh, sums[j][3] = start.y * kHigh;
        }
        const int64_t at = (product + more) * pairs_of_steps * kWarp + lane;
        if constexpr (kSteps > 0) {
#pragma unroll
          for (int s = 0; s < kSteps; s += 2) {
            const uint4 b = fragments[at + s / 2 * kWarp];
#pragma unroll
            for (int j = 0; j < kProducts; ++j) multiply_bytes<kBits == 8>(sums[j], a[s][j], b.x, b.y);
#pragma unroll
            for (int j = 0; j < kProducts; ++j) multiply_bytes<kBits == 8>(sums[j], a[s + 1][j], b.z, b.w);
          }
        } else {
          for (int64_t s = 0; s < pairs_of_steps; ++s) {
            const uint4 b = __ldg(all_fragments + at + s * kWarp);
            for (int odd = 0; odd < 2; ++odd) {
              load_step<kBits>(call.codes, r, tile, static_cast<int>(2 * s) + odd, next);
              operands_of<kBits>(next, a[0]);
#pragma unroll
              for (int j = 0; j < kProducts; ++j)
                multiply_bytes<kBits == 8>(sums[j], a[0][j], odd ? b.z : b.x, odd ? b.w : b.y);
            }
          }
        }
        if constexpr (!kSingle) {
#pragma unroll
          for (int j = 0; j < kProducts; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int32_t both =
                  sums[j][2 * half] > sums[j][2 * half + 1] ? sums[j][2 * half] : sums[j][2 * half + 1];
              largest[j][half] = largest[j][half] > both ? largest[j][half] : both;
            }
        }
      }
      constexpr int kShift = kBits == 4 ? 4 : 0;  // of high halves
      uint32_t reach = 0;
      if constexpr (kSingle) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int j = i / 4, half = i / 2 % 2, own = user + 2 * t + i % 2;
          const int32_t sum = half ? sums[j][i % 4] >> kShift : sums[j][i % 4];
          reach |= static_cast<uint32_t>(own < users && survives(sum, row_of_sum<kBits>(g, j, half), own)) << i;
        }
        if (__any_sync(kAllLanes, reach != 0))
          for (int i = 0; i < 16; ++i)
            queue.push(reach >> i & 1, user + 2 * t + i % 2, row_of_sum<kBits>(g, i / 4, i / 2 % 2));
      } else {
#pragma unroll
        for (int j = 0; j < kProducts; ++j) largest[j][1] >>= kShift;
        if (width == 2) {
          const int own = user + t;
#pragma unroll
          for (int i = 0; i < 8; ++i)
            reach |= static_cast<uint32_t>(own < users &&
                                           survives(largest[i / 2][i % 2], row_of_sum<kBits>(g, i / 2, i % 2), own))
                     << i;
          if (__any_sync(kAllLanes, reach != 0))
            for (int i = 0; i < 8; ++i) queue.push(reach >> i & 1, own, row_of_sum<kBits>(g, i / 2, i % 2));
        } else {
          // Two lanes share a user's columns, or four: each keeps the rows of two products, or one half of these.
          int32_t two[2][2];
          const int upper = t & 1;
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int32_t keeps = upper ? largest[2 + i][half] : largest[i][half];
              const int32_t hands = upper ? largest[i][half] : largest[2 + i][half];
              const int32_t other = __shfl_xor_sync(kAllLanes, hands, 1);
              two[i][half] = keeps > other ? keeps : other;
            }
          if (width == 4) {
            const int own = user + t / 2;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = row_of_sum<kBits>(g, 2 * upper + i / 2, i % 2);
              reach |= static_cast<uint32_t>(own < users && survives(two[i / 2][i % 2], row, own)) << i;
            }
            if (__any_sync(kAllLanes, reach != 0))
              for (int i = 0; i < 4; ++i)
                queue.push(reach >> i & 1, own, row_of_sum<kBits>(g, 2 * upper + i / 2, i % 2));
          } else {
            const int half = t / 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int32_t keeps = half ? two[i][1] : two[i][0], hands = half ? two[i][0] : two[i][1];
              const int32_t other = __shfl_xor_sync(kAllLanes, hands, 2);
              const int32_t sum = keeps > other ? keeps : other;
              reach |= static_cast<uint32_t>(survives(sum, row_of_sum<kBits>(g, 2 * upper + i, half), user)) << i;
            }
            if (__any_sync(kAllLanes, reach != 0))
              for (int i = 0; i < 2; ++i) queue.push(reach >> i & 1, user, row_of_sum<kBits>(g, 2 * upper + i, half));
          }
        }
      }
    }
    const bool finished = product >= products;
    if (queue.size) {
      // Neither this tile's operands nor the next one's loads take registers meanwhile: they are loaded again.
      rescore_queue<kBits>(call, first_user, tile, queue);
      load_next(finished ? following : tile);
    }
    __syncwarp();
    if (finished) {
      tile = following;
      product = user = 0;
    }
  }
  if (call.found.counts && blockIdx.x == 0 && threadIdx.x == 0 && blockIdx.y == 0)
    atomicAdd(call.found.counts, static_cast<unsigned long long>(gridDim.y * call.codes.count * block_bytes(r, kBits)));
}

}  // namespace urm
