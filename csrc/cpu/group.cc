#include "group.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>

#include "allowed_blocks.h"

namespace urm {
namespace {

constexpr int64_t kGroupQueries = 512;       // packed queries of a group stay in the second-level cache
constexpr int64_t kWorkPerThread = 1 << 22;  // multiply-adds that pay for waking a thread, about 0.2 ms
constexpr int64_t kChunkRows = 1 << 12;      // rows handed out at a time, at least
constexpr int64_t kMostChunkRows = 1 << 14;  // beginning one takes a microsecond or two
constexpr int64_t kChunksOfThread = 64;      // fewer are worse to share
constexpr int64_t kQueriesOfStream = 4;      // whose dots take as long as reading a row behind another
constexpr int64_t kQueriesOfRead = 16;       // and as reading one that lies by itself
constexpr double kCodedSpeed = 4;            // of sums of products of codes beside dots

constexpr int64_t kSliceQueries = 64;  // their cheap scores of a panel are 16 KiB
constexpr int64_t kFewestRows = 4096;  // smaller tables are scanned exactly: packing queries would cost as much

// Not below the query's length; not finite where the query is not.
float length_of(const float* query, int64_t padded) {
  double squares = 0;
  for (int64_t e = 0; e < padded; ++e) squares += static_cast<double>(query[e]) * query[e];
  return static_cast<float>(std::sqrt(squares) * (1 + 1e-6)) + kLeastLength;
}

bool wanted(const ScanRequest& request, int64_t queries) {
  if (request.row_scale.data) return false;
  if (request.scan != ScanMode::kAuto) return request.scan == ScanMode::kBounded;
  return queries > kDirectQueries && request.rows_met() >= kFewestRows;
}

int useful_threads(const ScanRequest& request, int64_t queries, int64_t padded, bool coded) {
  if (request.all_threads) return request.threads;
  const int64_t fewest = request.listed ? kQueriesOfRead : kQueriesOfStream;
  double work = static_cast<double>(request.rows_met()) * padded * std::max(queries, fewest);
  if (coded) work /= kCodedSpeed;
  return static_cast<int>(std::clamp<double>(work / kWorkPerThread, 1, std::max(request.threads, 1)));
}

// Near the golden section of the chunks, and without a common divisor: whatever order a catalogue has, the chunks of
// any time are spread over all of it.
int64_t scattering_step(int64_t chunks) {
  int64_t step = std::max<int64_t>(1, chunks * 618 / 1000);
  while (std::gcd(step, chunks) != 1) ++step;
  return step;
}

}  // namespace

int64_t padded_columns(const QueriesView& queries) {
  return round_up(std::max<int64_t>(queries.r, 1), kLanes);
}

int64_t users_of_group(const QueriesView& queries) {
  return std::max<int64_t>(1, kGroupQueries / std::max<int64_t>(1, queries.queries));
}

Group::Group(const ScanRequest& request, int64_t first, int64_t last, int64_t padded)
    : request(request),
      first_user(first),
      users(last - first),
      padded(padded),
      packed(pack_queries(request.queries, request.reduce, first, last, padded)) {
  if (packed.total > kDirectQueries) {
    panel.resize(query_panel_floats(packed.total, padded));
    pack_query_panel(packed.rows.data(), packed.total, padded, panel.data());
  }
  bounds = make_bounds(request, packed, users, padded);
  const int64_t n = request.rows_met();
  if (request.codes.bits && packed.total && request.scan != ScanMode::kExact &&
      (n >= kFewestRows || request.scan == ScanMode::kBounded))
    query_codes = encode_queries(packed, users, padded, request.codes, *request.kernels);
  const bool coded = !query_codes.empty();
  permuted = request.listed || (coded && request.codes.order);
  if (coded && request.overlay.count) {
    for (int64_t i = 0; i < request.overlay.count; ++i) replaced.push_back(place_of(request.overlay.rows[i]));
    std::sort(replaced.begin(), replaced.end());
  }
  threads = useful_threads(request, packed.total, padded, coded);
  int64_t wide = std::lcm(request.kernels->panel_rows, bounds.score ? bounds.score->panel_rows : 1);
  if (coded) wide = std::lcm(wide, std::max<int64_t>(kBlockRows, request.codes.cells.rows));
  const int64_t most = std::clamp(n / (kChunksOfThread * threads), kChunkRows, kMostChunkRows);
  chunk_rows = round_up(std::clamp<int64_t>(threads == 1 ? n : n / (8 * threads), 1, most), wide);
  chunks = (n + chunk_rows - 1) / chunk_rows;
  if (coded) chunk_step = scattering_step(chunks);
}

int Group::threads_for(double multiply_adds) const {
  if (request.all_threads) return threads;
  return static_cast<int>(std::clamp<double>(multiply_adds / (kCodedSpeed * kWorkPerThread), 1, threads));
}

int64_t Group::next_replaced(int64_t place) const {
  const auto next = std::lower_bound(replaced.begin(), replaced.end(), place);
  return next == replaced.end() ? request.items.rows : *next;
}

uint32_t Group::allowed_blocks(int64_t user, int64_t first, int64_t step, int64_t count) const {
  const Filter& filter = request.filter;
  if (request.blocks) {
    assert(step == 1);  // a sample is not taken of few blocks
    return request.blocks->among(first_user + user, first, count);
  }
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if (permuted || (filter.kind == MaskKind::kNone && !filter.alive)) return all;
  uint32_t some = 0;
  for (int64_t i = 0; i < count; ++i)
    if (filter.masked(first_user + user, (first + i * step) * kBlockRows, kBlockRows)) some |= 1u << i;
  return some;
}

uint32_t Group::allowed(int64_t user, int64_t place, uint32_t lanes) const {
  const Filter& filter = request.filter;
  if (!permuted) return filter.allowed(first_user + user, place, lanes);
  if (filter.allows_all()) return lanes;
  for (uint32_t left = lanes; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    if (!filter.allows(first_user + user, row_at(place + i))) lanes &= ~(1u << i);
  }
  return lanes;
}

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
