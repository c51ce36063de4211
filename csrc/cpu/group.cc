#include "group.h"

#include <algorithm>
#include <cmath>

namespace urm {
namespace {

constexpr int64_t kSliceQueries = 64;  // their cheap scores of a panel are 16 KiB
constexpr int64_t kFewestRows = 4096;  // smaller tables are scanned exactly: packing queries would cost as much

// Not below the query's length; not finite where the query is not.
float length_of(const float* query, int64_t padded) {
  double squares = 0;
  for (int64_t e = 0; e < padded; ++e) squares += static_cast<double>(query[e]) * query[e];
  return static_cast<float>(std::sqrt(squares) * (1 + 1e-6)) + kLeastLength;
}

bool wanted(const ScanRequest& request, int64_t queries) {
  if (request.scan != ScanMode::kAuto) return request.scan == ScanMode::kBounded;
  return queries > kDirectQueries && request.items.rows >= kFewestRows;
}

}  // namespace

GroupBounds make_bounds(const ScanRequest& request, const PackedQueries& packed, int64_t users, int64_t padded) {
  GroupBounds bounds;
  const CheapScore* cheap = request.kernels->cheap;
  if (!cheap || !packed.total || padded > kWidestCheapRow || !wanted(request, packed.total)) return bounds;

  AlignedVector<float> lengths(packed.total);
  for (int64_t q = 0; q < packed.total; ++q) {
    lengths[q] = length_of(packed.rows.data() + q * padded, padded);
    if (!(lengths[q] <= kLongestQuery)) return bounds;
  }
  const MatrixView& items = request.items;
  if (items.dtype == DType::kBFloat16 && items.column_stride == 1 && cheap->bfloat16_multiple &&
      items.columns % cheap->bfloat16_multiple == 0)
    bounds.rows = DType::kBFloat16;

  int64_t bytes = 0;
  for (int64_t user = 0; user < users;) {
    Slice slice{user, user + 1, packed.start[user], 0, bytes};
    while (slice.last_user < users && packed.start[slice.last_user + 1] - slice.first_query <= kSliceQueries)
      ++slice.last_user;
    slice.queries = packed.start[slice.last_user] - slice.first_query;
    user = slice.last_user;
    if (!slice.queries) continue;
    bounds.widest = std::max(bounds.widest, round_up(slice.queries, cheap->query_multiple));
    bytes += round_up(cheap->query_bytes(slice.queries, padded), kCacheLine);
    bounds.slices.push_back(slice);
  }
  bounds.queries.resize(bytes);
  bounds.slack.resize(packed.total);
  for (const Slice& slice : bounds.slices)
    cheap->pack_queries(packed.rows.data() + slice.first_query * padded, lengths.data() + slice.first_query,
                        slice.queries, padded, bounds.rows, bounds.queries.data() + slice.offset,
                        bounds.slack.data() + slice.first_query);
  bounds.score = cheap;
  return bounds;
}

}  // namespace urm
