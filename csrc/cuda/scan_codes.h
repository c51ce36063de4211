// The scan of a packed table: integer products of codes on the tensor cores, an upper bound of every score from them,
// and for what may still win the exact score at once, by the same warp. Lists hold nothing but keys that reach the
// threshold.
//
// A warp takes the 64 rows of a tile (tile.h) and all queries of its column group.
#pragma once

#include "prune.h"
#include "rescore.h"

namespace urm {

constexpr int kScanThreads = 128;
constexpr int kScanBlocks = 2;  // of a multiprocessor: their registers hold one tile and the next

// Rescores what the queue holds, two pairs at a time.
template <int kBits>
__device__ inline void rescore_queue(const ScanCall& call, int64_t first_user, int64_t tile, Queue& queue) {
  __syncwarp();
  const int half = lane_of_warp() / kLanes;
  for (int first = 0; first < queue.size; first += kWarp) {
    const int at = first + lane_of_warp();
    const uint32_t pair = at < queue.size ? queue.pairs[at] : 0;
    const int64_t user = first_user + pair / kRowsOfTile, place = tile * kRowsOfTile + pair % kRowsOfTile;
    const bool there = at < queue.size && user < call.users.B && place < call.codes.count * kBlockRows;
    const bool kept = there && call.limits.wanted[user] > 0 && is_allowed(call.filter, user, row_at(call.codes, place));
    uint32_t left = __ballot_sync(kAllLanes, kept);
    if (call.found.counts && lane_of_warp() == 0)
      atomicAdd(call.found.counts + 1, static_cast<unsigned long long>(__popc(left)));
    while (left) {
      const int one = __ffs(static_cast<int>(left)) - 1;
      left &= left - 1;
      const int other = __ffs(static_cast<int>(left)) - 1;  // -1: none
      left &= left - 1;
      const int from = half ? other : one;
      const int64_t of_user = __shfl_sync(kAllLanes, user, from), of_place = __shfl_sync(kAllLanes, place, from);
      rescore_pairs<kBits>(call, from < 0 ? -1 : of_user, from < 0 ? -1 : of_place);
    }
  }
  queue.size = 0;
  __syncwarp();
}

// Programs: (as many as fill the device, column groups). A column group is group_users users, each with `width`
// columns: 1, 2, 4 or a multiple of 8. kSteps: 32 elements each, 2 or 4, whose codes stay in registers; 0: rows are
// longer, and codes are loaded again for every eight columns. kSingle: width is 1, and no sum is the largest of
// several. kKeeps: the codes are those of cells, all of whose bounds [B, call.table.rows] are kept.
template <int kBits, int kSteps, bool kSingle, bool kKeeps>
__device__ __forceinline__ void scan_tiles(const ScanCall& call, int64_t group_users, const TileLists& lists,
                                           float* bounds) {
  URM_DYNAMIC_SHARED(shared);
  const int lane = lane_of_warp(), t = lane % 4;
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
  UserLimit* limits = reinterpret_cast<UserLimit*>(take(group_users * sizeof(UserLimit)));
  GroupSlack* slack_place = reinterpret_cast<GroupSlack*>(take(sizeof(GroupSlack)));
  RowTerms* terms = reinterpret_cast<RowTerms*>(take(blockDim.x / kWarp * kRowsOfTile * sizeof(RowTerms))) +
                    warp_of_block() * kRowsOfTile;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(take(blockDim.x / kWarp * kQueue * 4)) + warp_of_block() * kQueue;

  const uint4* all_fragments =
      reinterpret_cast<const uint4*>(call.queries.fragments) + first_product * pairs_of_steps * kWarp;
  const int2* all_starts = reinterpret_cast<const int2*>(call.queries.starts) + first_product * 4;
  for (int64_t i = threadIdx.x; i < held; i += blockDim.x) fragments[i] = all_fragments[i];
  for (int i = threadIdx.x; kSteps && i < products * 4; i += blockDim.x) starts[i] = all_starts[i];
  for (int i = threadIdx.x; i < group_users; i += blockDim.x)
    limits[i] = i < users ? UserLimit{call.limits.limit[first_user + i], call.limits.inverse[first_user + i]}
                          : UserLimit{infinity(), 0.0f};
  if (threadIdx.x < kWarp) {
    GroupSlack most{0.0f, 0.0f, 0.0f};
    for (int i = lane; i < users; i += kWarp) {
      const int64_t user = first_user + i;
      if (call.queries.step[user] == 0.0f) continue;
      const float over = call.limits.inverse[user] * (1.0f + 0x1p-20f);
      const float kept = call.queries.kept_most[user], lost = call.queries.lost_most[user];
      most.kept = larger(kept * over * call.queries.slack(), most.kept);
      most.lost = larger(lost * over * call.queries.slack(), most.lost);
      most.error = larger(code_error(r, call.rotation_roundings) * (kept + lost) * over, most.error);
    }
    most = {largest_of_lanes(most.kept), largest_of_lanes(most.lost), largest_of_lanes(most.error)};
    if (lane == 0) *slack_place = most;
  }
  __syncthreads();
  const GroupSlack slack = *slack_place;
  const float lost_reference = usable_reference(call.codes.reference[0], r, kBits);
  const float norm_reference = usable_reference(call.codes.reference[1], r, kBits);

  Queue queue{pairs, 0};
  const bool general = call.table.bias.data || call.users.log_sum_exp;
  const Prune<false> plain{terms, limits, 0.0f, &queue};
  const Prune<true> biased{terms, limits, relative_excess(call.users), &queue};

  constexpr int kHeld = kSteps ? kSteps : 1;
  const int32_t* list = lists.tiles ? lists.tiles + blockIdx.y * lists.room : nullptr;
  const int tiles = list ? lists.count[blockIdx.y] : static_cast<int>(tiles_of(call.codes));
  uint4 next[kHeld * kLoads<kBits>];
  LoadedSides next_sides;
  const auto load_tile = [&](int which) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) load_step<kBits>(call.codes, r, which, s, next + s * kLoads<kBits>);
    next_sides = load_sides<kBits>(call.codes, call.table, which);
  };
  // Behind the last one it is the last again.
  const auto tile_at = [&](int at) {
    const int there = at < tiles ? at : tiles - 1;
    return list ? __ldg(list + there) : there;
  };
  int at = static_cast<int>(warp_of_grid()), tile = 0, product = 0, user = 0;
  if (at < tiles) load_tile(tile = tile_at(at));
  while (at < tiles) {
    const int following = tile_at(at + static_cast<int>(warps_of_grid()));
    uint32_t a[kHeld][kProducts][4];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) operands_of<kBits>(next + s * kLoads<kBits>, a[s]);
    write_terms<kBits>(next_sides, slack, lost_reference, norm_reference, terms);
    __syncwarp();
    load_tile(following);

    for (; product < products && queue.size <= kQueue - kMostPairs; product += of_user, user += side_by_side) {
      int32_t largest[kProducts][2];
#pragma unroll
      for (int j = 0; j < kProducts; ++j) largest[j][0] = largest[j][1] = -0x7FFFFFFF;
      int32_t sums[kProducts][4];
      for (int more = 0; more < of_user; ++more) {
        const int2 start = kSteps ? starts[(product + more) * 4 + t] : __ldg(all_starts + (product + more) * 4 + t);
#pragma unroll
        for (int j = 0; j < kProducts; ++j) {
          sums[j][0] = start.x, sums[j][1] = start.y;
          sums[j][2] = start.x * kHigh<kBits>, sums[j][3] = start.y * kHigh<kBits>;
        }
        const int64_t from = (product + more) * pairs_of_steps * kWarp + lane;
        if constexpr (kSteps > 0) {
#pragma unroll
          for (int s = 0; s < kSteps; s += 2) {
            const uint4 b = fragments[from + s / 2 * kWarp];
#pragma unroll
            for (int j = 0; j < kProducts; ++j) multiply_bytes<kBits == 8>(sums[j], a[s][j], b.x, b.y);
#pragma unroll
            for (int j = 0; j < kProducts; ++j) multiply_bytes<kBits == 8>(sums[j], a[s + 1][j], b.z, b.w);
          }
        } else {
          for (int64_t s = 0; s < pairs_of_steps; ++s) {
            const uint4 b = __ldg(all_fragments + from + s * kWarp);
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
      if constexpr (kKeeps)
        hand_out<kBits, kSingle>(sums, largest, user, width,
                                 KeepBounds{terms, bounds + first_user * call.table.rows, call.table.rows,
                                            static_cast<int64_t>(tile) * kRowsOfTile, users});
      else if (general) hand_out<kBits, kSingle>(sums, largest, user, width, biased);
      else hand_out<kBits, kSingle>(sums, largest, user, width, plain);
    }
    const bool finished = product >= products;
    if constexpr (!kKeeps) {
      if (queue.size) {
        // Neither this tile's operands nor the next one's loads take registers meanwhile: they are loaded again.
        rescore_queue<kBits>(call, first_user, tile, queue);
        load_tile(finished ? following : tile);
      }
    }
    __syncwarp();
    if (finished) {
      at += static_cast<int>(warps_of_grid());
      tile = following;
      product = user = 0;
    }
  }
  if (call.found.counts && blockIdx.x == 0 && threadIdx.x == 0) {
    const int64_t blocks = tiles * kTileBlocks < call.codes.count ? tiles * kTileBlocks : call.codes.count;
    atomicAdd(call.found.counts, static_cast<unsigned long long>(blocks * block_bytes(r, kBits)));
  }
}

template <int kBits, int kSteps, bool kSingle>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    scan_codes(ScanCall call, int64_t group_users, TileLists lists) {
  scan_tiles<kBits, kSteps, kSingle, false>(call, group_users, lists, nullptr);
}

// Of a table packed in blocks: call.codes and call.table are those of the cells.
template <int kSteps, bool kSingle>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
    bound_cells(ScanCall call, int64_t group_users, float* bounds) {
  scan_tiles<kCellBits, kSteps, kSingle, true>(call, group_users, {}, bounds);
}

}  // namespace urm
