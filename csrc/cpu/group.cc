#include "group.h"

#include <algorithm>
#include <cmath>

namespace urm {
namespace {

constexpr int64_t kSliceQueries = 64;  // their cheap dots with a panel are 16 to 24 KiB
constexpr int64_t kFewestRows = 4096;   // smaller tables are scanned exactly: packing queries would cost as much

// Not below the query's length; not finite where the query is not.
float length_of(const float* query, int64_t padded) {
  double squares = 0;
  for (int64_t e = 0; e < padded; ++e) squares += static_cast<double>(query[e]) * query[e];
  return static_cast<float>(std::sqrt(squares) * (1 + 1e-6)) + kLeastLength;
}

bool worth_bounding(const ScanRequest& request, int64_t queries, int64_t padded) {
  if (request.scan != ScanMode::kAuto) return request.scan == ScanMode::kBounded;
  return queries >= request.kernels->cheap->fewest_queries && request.items.rows >= kFewestRows &&
         padded <= kWidestCheapRow;
}

}  // namespace

GroupBounds make_bounds(const ScanRequest& request, const PackedQueries& packed, int64_t users, int64_t padded) {
  GroupBounds bounds;
  const CheapScore& cheap = *request.kernels->cheap;
  if (!packed.total || padded > kWidestCheapRow || !worth_bounding(request, packed.total, padded)) return bounds;

  const MatrixView& items = request.items;
  if (cheap.takes_bfloat16 && items.dtype == DType::kBFloat16 && items.column_stride == 1 &&
      items.columns % cheap.width_multiple == 0)
    bounds.rows = DType::kBFloat16;
  const float error = cheap.error(bounds.rows, padded);
  for (int64_t q = 0; q < packed.total; ++q) {
    const float length = length_of(packed.rows.data() + q * padded, padded);
    if (!(length <= kLongestQuery)) return bounds;
    bounds.slack.push_back(error * length);
  }

  int64_t bytes = 0;
  for (int64_t user = 0; user < users;) {
    Slice slice{user, user + 1, packed.start[user], 0, bytes};
    while (slice.last_user < users && packed.start[slice.last_user + 1] - slice.first_query <= kSliceQueries)
      ++slice.last_user;
    slice.queries = packed.start[slice.last_user] - slice.first_query;
    user = slice.last_user;
    if (!slice.queries) continue;
    const int64_t rounded = round_up(slice.queries, cheap.query_multiple);
    bounds.widest = std::max(bounds.widest, rounded);
    bytes += cheap_bytes(cheap, rounded, padded);
    bounds.slices.push_back(slice);
  }
  bounds.queries.resize(bytes);
  for (const Slice& slice : bounds.slices)
    cheap.pack_queries(packed.rows.data() + slice.first_query * padded, slice.queries, padded,
                       bounds.rows, bounds.queries.data() + slice.offset);
  bounds.score = &cheap;
  return bounds;
}

}  // namespace urm
