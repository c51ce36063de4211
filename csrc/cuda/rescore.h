// What becomes of a survivor: which of the user's queries may reach the threshold, their canonical dots, a key.
#pragma once

#include "../common/code_bound.h"
#include "../common/total_order.h"
#include "canonical.h"
#include "mma.h"
#include "queries.h"
#include "threshold.h"

namespace urm {

constexpr int kFewQueries = 4;  // up to here scoring all takes less than telling which

// Lists of keys that reach the threshold; a list that is full keeps counting.
struct Found {
  uint64_t* keys;       // [B, capacity]
  unsigned int* count;  // [B]
  int64_t capacity;
  unsigned long long* counts;  // bytes read, survivors of the scan, pairs scored; or null
};

__device__ inline void append_key(const Found& found, int64_t user, float score, int64_t row) {
  const unsigned int slot = atomicAdd(found.count + user, 1u);
  if (slot < found.capacity) found.keys[user * found.capacity + slot] = pack_key(score, static_cast<uint32_t>(row));
}

struct ScanCall {
  Table table;
  Filter filter;
  Users users;
  Codes codes;
  QueryCodes queries;
  Limits limits;
  Found found;
  int64_t rotation_roundings;
};

// A word of the codes at a place, signed bytes, of 4 bits c + 8: of the fine ones where there are any.
template <int kBits>
__device__ __forceinline__ uint32_t signed_quad(const Codes& codes, int64_t r, int64_t place, int64_t quad) {
  if (kBits == 2)  // has fine codes always
    return unpacked_quad(*reinterpret_cast<const uint16_t*>(codes.fine + place * fine_row_bytes(r, 2) + quad * 2));
  if (codes.fine)
    return *reinterpret_cast<const uint32_t*>(codes.fine + place * fine_row_bytes(r, 4) + quad * kQuad) ^ 0x80808080u;
  const unsigned char* block = codes.blocks + place / kBlockRows * block_bytes(r, kBits);
  const int64_t in_block = place % kBlockRows;
  const uint32_t word = *reinterpret_cast<const uint32_t*>(block + code_place(in_block, quad * kQuad, kBits));
  if (kBits == 8) return word ^ 0x80808080u;
  return (in_block < kLanes ? word : word >> 4) & 0x0F0F0F0Fu;
}

template <int kBits>
__device__ inline RowSide side_of(const Codes& codes, int64_t r, int64_t place) {
  if (!codes.fine)
    return side_of_row(reinterpret_cast<const char*>(codes.blocks) + place / kBlockRows * block_bytes(r, kBits),
                       block_code_bytes(r, kBits), place % kBlockRows);
  const unsigned char* side = codes.fine + place * fine_row_bytes(r, kBits) + fine_code_bytes(r, kBits);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(side);
  // Rows of 4 bits lie at multiples of 2.
  const float scale = float_of_bits(halves[0] | static_cast<uint32_t>(halves[1]) << 16);
  return {scale, halves[2], halves[3]};
}

// A float as code_bound takes it.
struct One {
  float x;

  __device__ static One multiply(One a, One b) { return {a.x * b.x}; }
  __device__ static One add(One a, One b) { return {a.x + b.x}; }
  __device__ static One fma(One a, One b, One c) { return {fused_multiply_add(a.x, b.x, c.x)}; }
};

// Of 32 queries from `first` on, a bit for each whose own bound of the row at a place reaches the user's threshold.
// Where one does under logsumexp, all are needed. These bounds are certain: a probable one says which rows to score,
// not which queries make their scores. Where bounds are probable, there is no query unless one of these reaches it as
// well; of users with more queries than that, the scan's have decided.
template <int kBits>
__device__ inline uint32_t queries_that_reach(const ScanCall& call, int64_t user, int64_t place, int64_t first) {
  const int64_t r = call.table.r, width = call.queries.width, m = first + lane_of_warp();
  const int32_t count = call.users.count[user];
  const bool there = m < count;
  const float step = call.queries.step[user];
  if (step == 0.0f || (count <= kFewQueries && !call.codes.fine)) return __ballot_sync(kAllLanes, there);
  const int64_t at = user * width + (there ? m : 0);
  const uint32_t* words = call.queries.words + user * quads_of(r) * width + (there ? m : 0);
  int32_t sum = call.queries.row_starts[at];
#pragma unroll 8
  for (int64_t quad = 0; quad < quads_of(r); ++quad)
    sum = add_products(signed_quad<kBits>(call.codes, r, place, quad), __ldg(words + quad * width), sum);
  const RowSide side = side_of<kBits>(call.codes, r, place);
  const CodedLengths<One> lengths{{side.scale}, {value_of_half(side.lost)}, {value_of_half(side.norm)}};
  const float error =
      code_error(r, call.rotation_roundings) * (call.queries.kept_most[user] + call.queries.lost_most[user]);
  const float bias = call.table.bias.data ? value_of(call.table.bias, row_at(call.codes, place)) : 0.0f;
  const auto that_reach = [&](float slack) {
    float bound = code_bound<One>({float_not_below(sum)}, {step}, {slack * call.queries.kept[at]},
                                  {slack * call.queries.lost[at]}, {error}, {kCodeUnderflow}, lengths)
                      .x;
    if (call.users.log_sum_exp) {
      float relative, offset;
      log_sum_exp_excess(count, &relative, &offset);
      bound = fused_multiply_add(fabsf(bound), relative, bound) + offset;
    }
    return __ballot_sync(kAllLanes, there && !(bound + bias < call.limits.threshold[user]));
  };
  // Where the scan's limit rules out nothing, neither does chance.
  const bool likely = count <= kWarp && call.limits.limit[user] > -infinity();
  const float slack = likely ? call.queries.row_slack() : 1.0f;
  return slack < 1.0f && !that_reach(slack) ? 0u : that_reach(1.0f);
}

// Scores two pairs of a user and a place, one a half warp, and lists their keys where they reach the threshold.
// user < 0: no pair.
template <int kBits>
__device__ inline void rescore_pairs(const ScanCall& call, int64_t user, int64_t place) {
  const int half = lane_of_warp() / kLanes;
  const Table& table = call.table;
  const int64_t r = table.r, places = call.users.places;
  const int64_t user0 = __shfl_sync(kAllLanes, user, 0), user1 = __shfl_sync(kAllLanes, user, kLanes);
  const int64_t place0 = __shfl_sync(kAllLanes, place, 0), place1 = __shfl_sync(kAllLanes, place, kLanes);
  const int32_t count0 = user0 < 0 ? 0 : call.users.count[user0], count1 = user1 < 0 ? 0 : call.users.count[user1];
  const int32_t most_queries = count0 > count1 ? count0 : count1;
  const float* queries = call.users.queries + (user < 0 ? 0 : user) * places * r;
  const int64_t row = user < 0 ? 0 : row_at(call.codes, place);
  const auto dot_at = [&](int64_t m) { return scaled_dot(table, row, half_dot(table, row, queries + m * r)); };
  float best = -infinity();
  bool asked = false;
  for (int32_t first = 0; first < most_queries; first += kWarp) {
    const uint32_t reach0 = first < count0 ? queries_that_reach<kBits>(call, user0, place0, first) : 0;
    const uint32_t reach1 = first < count1 ? queries_that_reach<kBits>(call, user1, place1, first) : 0;
    uint32_t own = half ? reach1 : reach0;
    asked |= own != 0;
    if (call.users.log_sum_exp) continue;
    while (__any_sync(kAllLanes, own != 0)) {
      const float dot = dot_at(own ? first + __ffs(static_cast<int>(own)) - 1 : 0);
      if (own) best = larger(dot, best);
      own &= own - 1;
    }
  }
  if (call.users.log_sum_exp && __any_sync(kAllLanes, asked)) {
    const int32_t count = half ? count1 : count0;
    for (int32_t m = 0; m < most_queries; ++m) {
      const float dot = dot_at(m < count ? m : 0);
      if (m < count) best = larger(dot, best);
    }
    SumOfExponentials sum{best, 0.0f, 0.0f};
    for (int32_t m = 0; m < most_queries; ++m) {
      const float dot = dot_at(m < count ? m : 0);
      if (m < count) sum.add(dot);
    }
    if (best - best == 0.0f) best = log_of(sum);
  }
  if (lane_of_warp() % kLanes != 0 || !asked) return;
  if (call.found.counts) {
    atomicAdd(call.found.counts, static_cast<unsigned long long>(r * bytes_of(table.type)));
    atomicAdd(call.found.counts + 2, 1ull);
  }
  const float score = finished_score(table, row, best);
  if (score >= call.limits.threshold[user]) append_key(call.found, user, score, row);
}

}  // namespace urm
