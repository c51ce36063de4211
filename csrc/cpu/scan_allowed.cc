#include "scan_allowed.h"

#include <algorithm>

namespace urm {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kSampledWords = 64;  // of masks, before all of them are read
constexpr int64_t kSampledRows = 32;   // of those that are allowed
constexpr int64_t kFewestSampled = 8;
constexpr double kMostRows = 1.0 / 3;    // of a table's; a row by itself takes as long as a few behind each other
constexpr double kMostBlocks = 1.0 / 8;  // more, and samples and cells pay
constexpr double kRowsByCodes = 16;      // whose codes, next to each other, are read while a row by itself is scored
constexpr double kRowsByCodesOfMany = 10;
constexpr int64_t kManyQueries = 8;
constexpr double kFewBytes = 4 << 20;  // of rows: read before two passes over codes have said which of them are needed

struct AllowedRow {
  int64_t user, row;
};

// What rows that masks allow have in common: how many there are in their block, as the mean of 1 / number.
double shares_of_blocks(const ScanRequest& request, const std::vector<AllowedRow>& sample) {
  const Codes& codes = request.codes;
  double shares = 0;
  for (const AllowedRow& allowed : sample) {
    if (allowed.row >= codes.rows()) {
      shares += 1;
      continue;
    }
    const int64_t first = (codes.order ? codes.place_of(allowed.row) : allowed.row) / kBlockRows * kBlockRows;
    int64_t count = 0;
    if (codes.order) {
      for (int64_t place = first; place < first + kBlockRows; ++place)
        count += request.filter.allows(allowed.user, codes.row_at(place));
    } else {
      count = __builtin_popcountll(request.filter.masked(allowed.user, first, kBlockRows));
    }
    shares += 1 / static_cast<double>(std::max<int64_t>(count, 1));
  }
  return shares / static_cast<double>(sample.size());
}

// `rows` is the share of the table that masks allow, all masks together; `queries` those of a mask.
Reading reading_of(const ScanRequest& request, double rows, int64_t queries, const std::vector<AllowedRow>& sample) {
  if (!request.codes.bits) return rows < kMostRows ? Reading::kRows : Reading::kAll;
  if (sample.empty()) return Reading::kRows;
  const double blocks_of_row = shares_of_blocks(request, sample), rows_read = kBlockRows * blocks_of_row;
  const double rows_by_codes = queries > kManyQueries ? kRowsByCodesOfMany : kRowsByCodes;
  const double bytes = rows * static_cast<double>(request.items.rows * row_bytes(request.items));
  if ((rows_by_codes < rows_read || bytes < kFewBytes) && request.scan != ScanMode::kBounded)
    return rows < kMostRows ? Reading::kRows : Reading::kAll;
  return rows * rows_read < kMostBlocks ? Reading::kBlocks : Reading::kAll;
}

}  // namespace

Allowed allowed_of(const ScanRequest& request, int64_t first, int64_t last) {
  const Filter& filter = request.filter;
  const int64_t rows = request.items.rows, masks = filter.mask_user_stride ? last - first : 1;
  const int64_t queries = (last - first) / masks * request.queries.queries;
  if (filter.kind == MaskKind::kNone || filter.row_step != 1) return {};  // a sample's rows are few already
  std::vector<AllowedRow> sample;
  int64_t sampled = 0, allowed = 0;
  for (int64_t i = 0; i < kSampledWords && rows >= kWord; ++i) {
    const int64_t user = first + i % masks, row = i * (rows / kWord) / kSampledWords * kWord;
    const uint64_t bits = filter.masked(user, row, kWord);
    if (bits && static_cast<int64_t>(sample.size()) < kSampledRows)
      sample.push_back({user, row + __builtin_ctzll(bits)});
    if (bits) allowed += __builtin_popcountll(bits);
    sampled += kWord;
  }
  const auto share = [&](int64_t count, int64_t of) { return static_cast<double>(count) / static_cast<double>(of); };
  if (static_cast<int64_t>(sample.size()) >= kFewestSampled &&
      reading_of(request, share(allowed * masks, sampled), queries, sample) == Reading::kAll)
    return {};
  Allowed out;
  out.lists = few_allowed(filter, rows, first, last, static_cast<int64_t>(kMostRows * static_cast<double>(rows)),
                          request.threads);
  if (out.lists.empty()) return {};
  sample.clear();
  int64_t listed = 0;
  for (const AlignedVector<uint32_t>& list : out.lists) listed += static_cast<int64_t>(list.size());
  for (int64_t i = 0; i < kSampledRows; ++i) {
    const AlignedVector<uint32_t>& list = out.lists[i % masks];
    if (!list.empty()) sample.push_back({first + i % masks, list[i * list.size() / kSampledRows]});
  }
  out.reading = reading_of(request, share(listed, rows), queries, sample);
  return out;
}

}  // namespace urm
