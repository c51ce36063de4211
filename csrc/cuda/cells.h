// The level above a packed table's codes: what the bounds of cells (bound_cells) decide before the scan. The most
// promising cells give every user a threshold that k rows reach; then the tiles of cells whose bound is below it, for
// all users of a column group, are left out of the scan.
#pragma once

#include "allowed.h"
#include "prune.h"

namespace urm {

// Whether a tile that the cell has a part of may hold an allowed row.
__device__ inline bool cell_may_hold(const Cells& cells, const Allowed& allowed, int64_t cell) {
  const int64_t end = (cell + 1) * cells.blocks_of_cell;
  for (int64_t tile = cell * cells.blocks_of_cell / kTileBlocks; tile * kTileBlocks < end; ++tile)
    if (may_hold(allowed, tile)) return true;
  return false;
}

// Cells as one user sees them.
struct CellsOfUser {
  const float *bounds, *most;
  UserLimit limit;
  float relative;
  bool general;

  __device__ CellsOfUser(const Cells& cells, const Users& users, const Limits& limits, int64_t user, float excess)
      : bounds(cells.bounds + user * cells.count), most(cells.most) {
    limit = {limits.limit[user], limits.inverse[user]};
    relative = excess;
    general = most || users.log_sum_exp;
  }

  // Whether a row of the cell may reach the threshold.
  __device__ bool reach(int64_t cell) const {
    const float bound = bounds[cell], bias = most ? __ldg(most + cell) : 0.0f;
    return general ? reaches<true>(bound, bias, limit, relative) : reaches<false>(bound, bias, limit, relative);
  }

  // What cells are ranked by.
  __device__ float promise_of(int64_t cell) const {
    return most ? fused_multiply_add(__ldg(most + cell), limit.inverse, bounds[cell]) : bounds[cell];
  }
};

// Where not even one cell in so many is below a threshold that was guessed, bounds do not tell good rows from others.
constexpr int64_t kLeftOutOf = 64;

// One block a user: promise [B], the rank-th best promise among one of every `step` cells, `sample` of them; +inf,
// which no cell has, where bounds are no use.
//
// Shared memory: kSelectShared, and 4 bytes a sampled cell.
__global__ void set_promise(Cells cells, Allowed allowed, Users users, Limits limits, int64_t step, int64_t sample,
                            int64_t rank, float* promise) {
  URM_DYNAMIC_SHARED(shared);
  unsigned int* reaching = reinterpret_cast<unsigned int*>(shared);
  const int64_t user = blockIdx.x;
  float* promises = reinterpret_cast<float*>(shared + kSelectShared);
  const CellsOfUser own(cells, users, limits, user, relative_excess(users));
  if (threadIdx.x == 0) *reaching = 0;
  __syncthreads();
  unsigned int found = 0;
  for (int64_t i = threadIdx.x; i < sample; i += blockDim.x) {
    const int64_t wanted = sampled_row(i, step), cell = wanted < cells.count ? wanted : cells.count - 1;
    const bool may = cell_may_hold(cells, allowed, cell);
    promises[i] = may ? own.promise_of(cell) : -infinity();
    found += may && own.reach(cell);
  }
  atomicAdd(reaching, found);
  __syncthreads();
  const bool tells = *reaching * kLeftOutOf < (kLeftOutOf - 1) * sample;
  __syncthreads();
  float least = infinity();
  if (tells) {
    const auto key_of = [=](int64_t i) { return static_cast<uint64_t>(ordered_bits(promises[i])) << 32; };
    least = key_score(key_at_rank(sample, rank, shared, key_of, 4));
  }
  if (threadIdx.x == 0) promise[user] = limits.wanted[user] > 0 ? least : infinity();
}

// Scores exactly all rows of a user's promising cells, at most `most` cells. Of those that the user may be given,
// scores [B, room] get the ones that reach the threshold as it is, as many as there is room for. Programs: (any number,
// users); scores are -inf at first, taken [2, B] (cells, and scores) zero.
__global__ void score_promising(Table table, Users users, Filter filter, Codes codes, Cells cells, Allowed allowed,
                                Limits limits, const float* promise, int64_t most, unsigned int* taken, float* scores,
                                int64_t room) {
  const int64_t user = blockIdx.y, rows_of_cell = cells.blocks_of_cell * kBlockRows;
  const float least = promise[user];
  if (least == infinity()) return;
  const CellsOfUser of_user(cells, users, limits, user, relative_excess(users));
  const float threshold = limits.threshold[user];
  const int half = lane_of_warp() / kLanes;
  // Promising cells are neighbours: the lanes of a warp look at cells that lie apart.
  for (int64_t first = warp_of_grid(); first < cells.count; first += kWarp * warps_of_grid()) {
    const int64_t mine = first + lane_of_warp() * warps_of_grid();
    const bool promising =
        mine < cells.count && !(of_user.promise_of(mine) < least) && cell_may_hold(cells, allowed, mine);
    for (uint32_t left = __ballot_sync(kAllLanes, promising); left; left &= left - 1) {
      const int64_t cell = first + (__ffs(static_cast<int>(left)) - 1) * warps_of_grid();
      unsigned int slot = 0;
      if (lane_of_warp() == 0) slot = atomicAdd(taken + user, 1u);
      slot = __shfl_sync(kAllLanes, slot, 0);
      if (slot >= most) return;
      for (int64_t in_cell = 0; in_cell < rows_of_cell; in_cell += 2 * kTileRows) {
        int64_t rows[kTileRows];
        for (int i = 0; i < kTileRows; ++i)
          rows[i] = row_at(codes, cell * rows_of_cell + in_cell + half * kTileRows + i);
        scores_of_rows(table, users, user, user + 1, rows, [&](int64_t, int64_t row, float score) {
          if (!(score >= threshold) || !is_allowed(filter, user, row)) return;
          const unsigned int at = atomicAdd(taken + users.B + user, 1u);
          if (at < room) scores[user * room + at] = score;
        });
      }
    }
  }
}

// The tiles that may hold a row that one of a column group's users is given, in any order; of a table without cells
// (their count is 0), those that a mask leaves. Programs: (any number, column groups); lists.count is zero at first.
__global__ void list_tiles(Codes codes, Cells cells, Allowed allowed, Users users, Limits limits, int64_t group_users,
                           TileLists lists, unsigned long long* counts) {
  const int64_t first_user = static_cast<int64_t>(blockIdx.y) * group_users;
  const int64_t last_user = first_user + group_users < users.B ? first_user + group_users : users.B;
  const int64_t tiles = tiles_of(codes);
  const float excess = relative_excess(users);
  int64_t asked = 0, left_out = 0;
  for (int64_t first = warp_of_grid() * kWarp; first < tiles; first += warps_of_grid() * kWarp) {
    const int64_t tile = first + lane_of_warp();
    bool reach = false;
    int64_t begun = 0;  // cells, in this tile
    for (int64_t block = tile * kTileBlocks; block < (tile + 1) * kTileBlocks && block < codes.count; ++block) {
      const int64_t cell = block / cells.blocks_of_cell;
      reach |= cell >= cells.count;
      if (cell >= cells.count) continue;
      begun += block % cells.blocks_of_cell == 0;
      for (int64_t user = first_user; user < last_user && !reach; ++user)
        reach = limits.wanted[user] > 0 && CellsOfUser(cells, users, limits, user, excess).reach(cell);
    }
    const bool wanted = reach && may_hold(allowed, tile);
    asked += begun;
    left_out += wanted ? 0 : begun;
    const uint32_t votes = __ballot_sync(kAllLanes, wanted);
    int32_t before = 0;
    if (lane_of_warp() == 0) before = atomicAdd(lists.count + blockIdx.y, __popc(votes));
    before = __shfl_sync(kAllLanes, before, 0);
    if (wanted)
      lists.tiles[blockIdx.y * lists.room + before + __popc(votes & ((1u << lane_of_warp()) - 1))] =
          static_cast<int32_t>(tile);
  }
  asked = sum_of_lanes(asked) * (last_user - first_user);
  left_out = sum_of_lanes(left_out) * (last_user - first_user);
  if (counts && lane_of_warp() == 0) {
    atomicAdd(counts + 3, static_cast<unsigned long long>(asked));
    atomicAdd(counts + 4, static_cast<unsigned long long>(left_out));
  }
}

}  // namespace urm
