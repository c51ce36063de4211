// A call's queries: those that exist, side by side, and their codes.
#pragma once

#include "rotate.h"
#include "rows.h"

namespace urm {

enum Combine : int64_t { kEach = 0, kSum = 1, kMean = 2 };

constexpr float kZeroQuery = -1.0f;  // in place of the largest element

// A user's `place`-th existing query, or places where there are fewer; *count: how many exist.
__device__ inline int64_t query_at(const uint8_t* exists, int64_t M, int64_t place, int32_t* count) {
  if (!exists) {
    *count = static_cast<int32_t>(M);
    return place;
  }
  int64_t found = M;
  int32_t seen = 0;
  for (int64_t first = 0; first < M; first += kWarp) {
    const int64_t m = first + lane_of_warp();
    uint32_t votes = __ballot_sync(kAllLanes, m < M && exists[m]);
    const int32_t before = seen;
    seen += __popc(votes);
    if (found == M && seen > place) {
      for (int64_t skip = place - before; skip > 0; --skip) votes &= votes - 1;
      found = first + __ffs(static_cast<int>(votes)) - 1;
    }
  }
  *count = seen;
  return found;
}

// One warp a place of a user: given fp32 [B, M, r] -> packed, rotated fp32 [B, places, r] and largest fp32 [B, places],
// of the rotated query (NaN where an element is, kZeroQuery where all are zero); count int32 [B]. Under kSum and kMean
// a user has one place: existing queries added in ascending m, divided by their number once. Counters [B] are zeroed.
//
// Shared memory: r floats a warp.
__global__ void prepare_queries(const float* given, const uint8_t* exists, int64_t B, int64_t M, int64_t combine,
                                int64_t places, Rotation rotation, float* packed, float* rotated, float* largest,
                                int32_t* count, float* kept_most, float* lost_most, unsigned int* found) {
  URM_DYNAMIC_SHARED(shared);
  const int r = static_cast<int>(rotation.r), lane = lane_of_warp();
  float* x = reinterpret_cast<float*>(shared) + warp_of_block() * r;
  for (int64_t task = warp_of_grid(); task < B * places; task += warps_of_grid()) {
    const int64_t user = task / places, place = task % places;
    const float* queries = given + user * M * r;
    const uint8_t* there = exists ? exists + user * M : nullptr;
    int32_t existing;
    const int64_t m = query_at(there, M, place, &existing);
    float nan = 0.0f, most = 0.0f;
    for (int e = lane; e < r; e += kWarp) {
      float q = 0.0f;
      if (combine == kEach) {
        if (m < M && place < existing) q = queries[m * r + e];
      } else {
        for (int64_t each = 0; each < M; ++each)
          if (!there || there[each]) q += queries[each * r + e];
        if (combine == kMean) q = q / static_cast<float>(existing > 1 ? existing : 1);
      }
      packed[task * r + e] = x[e] = q;
      if (q != q) nan = q;
      most = fabsf(q) > most ? fabsf(q) : most;
    }
    __syncwarp();
    const float before = largest_of_lanes(nan != nan ? nan : most);
    rotate<kWarp>(rotation, lane, x);
    most = 0.0f;
    for (int e = lane; e < r; e += kWarp) {
      rotated[task * r + e] = x[e];
      most = larger(fabsf(x[e]), most);
    }
    most = largest_of_lanes(most);
    if (most != most) most = infinity();  // of an infinite element
    if (lane == 0) {
      largest[task] = before != before ? before : before == 0.0f ? kZeroQuery : most;
      if (place == 0) {
        count[user] = combine == kEach ? existing : existing > 0;
        kept_most[user] = lost_most[user] = 0.0f;
        found[user] = 0;
      }
    }
    __syncwarp();
  }
}

constexpr float kLargestQueryCode = 127.0f;
constexpr double kLengthGrowth = 1 + 1e-6;  // covers the roundings of sums in double precision and to float
constexpr float kLeastKept = 0x1p-120f;     // so that no product of a length with +inf is NaN

// Of columns without a query: below every sum of one that is, and a sixteenth of what a sum has room for under 4 bits
// or 2.
__device__ inline int absent_start(int bits) {
  return bits == 8 ? -(1 << 29) : -(1 << 26);
}

// Any constant is right; those from a file may be none at all.
__device__ inline float usable_reference(float reference, int64_t r, int bits) {
  const float most = static_cast<float>(largest_code(bits)) * sqrtf(static_cast<float>(r));
  return reference >= 0 ? (reference < most ? reference : most) : 0.0f;
}

// What a scan and its survivors need of the codes of the queries, `width` columns a user. The scan's operands lie as
// scan_codes.h says; for one row at a time there are words [B, quads, width], starts, kept and lost [B, width]. Of a
// user: step (0: no certain bound), and the largest kept and lost. Of all: the shares of the certain slack in bounds
// of the scan and of single rows, as the bits of floats; below 1 bounds are probable.
struct QueryCodes {
  uint32_t* fragments;
  int32_t* starts;
  int64_t width, step_pairs;
  uint32_t* words;
  int32_t* row_starts;
  float *kept, *lost, *step, *kept_most, *lost_most;
  int64_t slack_bits, row_slack_bits;

  __device__ float slack() const { return float_of_bits(static_cast<uint32_t>(slack_bits)); }
  __device__ float row_slack() const { return float_of_bits(static_cast<uint32_t>(row_slack_bits)); }
};

// Place of a column's quad among the words that the tensor cores read: see tile.h.
__device__ inline int64_t fragment_place(int64_t column, int64_t quad, int64_t step_pairs, int bits) {
  const int64_t step = quad / 8, t = bits == 2 ? quad % 8 / 2 : quad % 4, second = bits == 2 ? quad % 2 : quad % 8 / 4;
  return ((column / 8 * step_pairs + step / 2) * kWarp + column % 8 * 4 + t) * 4 + step % 2 * 2 + second;
}

// What the tensor cores multiply: (c + 3) / 2 of 2 bits, c + 8 of 4, c itself of 8.
__device__ inline int offset_of_operand(int bits) {
  return bits == 8 ? 0 : code_offset(bits);
}

// One warp a column of a user. `fine`: single rows are bounded by their fine codes, which of 8 bits have no offset
// there.
__global__ void encode_queries(int64_t B, int64_t places, int64_t r, int64_t bits_of_scan, int64_t fine,
                               const float* rotated, const float* largest, const int32_t* count, const float* reference,
                               QueryCodes out) {
  const int lane = lane_of_warp(), bits = static_cast<int>(bits_of_scan);
  const int64_t quads = quads_of(r), width = out.width;
  const int64_t columns = (B * width + 7) / 8 * 8;  // those of the last product have no user
  for (int64_t column = warp_of_grid(); column < columns; column += warps_of_grid()) {
    const int64_t user = column / width, m = column % width;
    const int32_t existing = user < B ? count[user] : 0;
    float most = kZeroQuery;
    for (int64_t place = lane; place < existing; place += kWarp) most = larger(largest[user * places + place], most);
    most = largest_of_lanes(most);
    float step = most == kZeroQuery ? 1.0f : most / kLargestQueryCode;
    const bool bounded = step >= kLeastCodeScale && step <= kLargestCodedLength;
    if (!bounded) step = 1.0f;
    const bool there = m < existing;
    const float* query = rotated + (user * places + m) * r;
    double lost = 0, kept = 0;
    int sum = 0;
    for (int64_t quad = lane; quad < out.step_pairs * 16; quad += kWarp) {
      uint32_t word = 0;
      for (int j = 0; j < kQuad; ++j) {
        const int64_t e = quad * kQuad + j;
        if (!there || !bounded || e >= r) continue;
        float code = rintf(query[e] / step);
        code = code > kLargestQueryCode ? kLargestQueryCode : code < -kLargestQueryCode ? -kLargestQueryCode : code;
        const double value = static_cast<double>(step) * code, rest = query[e] - value;
        lost += rest * rest;
        kept += value * value;
        sum += static_cast<int>(code);
        word |= (static_cast<uint32_t>(static_cast<int>(code)) & 0xFFu) << 8 * j;
      }
      out.fragments[fragment_place(column, quad, out.step_pairs, bits)] = word;
      if (quad < quads && user < B) out.words[(user * quads + quad) * width + m] = word;
    }
    lost = sum_of_lanes(lost);
    kept = sum_of_lanes(kept);
    sum = sum_of_lanes(sum);
    if (lane == 0) {
      const float g = there ? static_cast<float>(sqrt(kept) * kLengthGrowth) + kLeastKept : 0.0f;
      const float f = there ? static_cast<float>(sqrt(lost) * kLengthGrowth) + kLeastKept : 0.0f;
      const double of_row = static_cast<double>(g) * usable_reference(reference[0], r, bits);
      const double of_query = static_cast<double>(f) * usable_reference(reference[1], r, bits);
      // Of a probable bound: standard deviations of two errors, which do not depend on each other.
      const double slack =
          out.slack() < 1.0f ? out.slack() * sqrt(of_row * of_row + of_query * of_query) : of_row + of_query;
      const int32_t start = static_cast<int32_t>(ceil(slack / step * kLengthGrowth)) - offset_of_operand(bits) * sum;
      out.starts[column] = !there      ? absent_start(bits)
                           : bits == 2 ? (start + 1) >> 1
                                       : start;  // half of it, rounded up
      out.row_starts[column] = -offset_of_operand(fine ? fine_bits(bits) : bits) * sum;
      out.kept[column] = g;
      out.lost[column] = f;
      if (user < B) {
        if (m == 0) out.step[user] = bounded ? step : 0.0f;
        raise_to(out.kept_most + user, g);
        raise_to(out.lost_most + user, f);
      }
    }
  }
}

}  // namespace urm
