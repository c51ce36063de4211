#include "scanner.h"

#include <algorithm>
#include <limits>

#include "allowed_blocks.h"
#include "cell_bounds.h"
#include "exact_dots.h"
#include "float_environment.h"
#include "partition_results.h"
#include "rescore.h"
#include "topk_results.h"

namespace urm {
namespace {

constexpr int64_t kStretchRows = 192;  // whole panels of 48 and 64 rows; the pace is set anew for each

}  // namespace

template <class Results>
void Scanner<Results>::run() {
  const int64_t n = group_.places();
  for (;;) {
    const int64_t begin = group_.chunk_begin(group_.next_chunk.fetch_add(1, std::memory_order_relaxed));
    if (begin < 0 || group_.stop.load(std::memory_order_relaxed)) break;
    results_.adopt(slot_);
    scan_chunk(begin, std::min(n, begin + group_.chunk_rows));
    results_.publish(slot_);
    if (group_.guess) expect(group_.done_chunks.fetch_add(1, std::memory_order_relaxed) + 1);
    if (slot_ == 0 && request_.interrupted && request_.interrupted())
      group_.stop.store(true, std::memory_order_relaxed);
  }
  group_.count(counts_);
  group_.count(codes_.counts());
}

// At 1/32, 1/16, ... 1/2 of the way. Chunks that others have begun count as done: their rows may be among those found.
template <class Results>
void Scanner<Results>::expect(int64_t done) {
  constexpr int64_t kFewestChunks = 6;
  for (int64_t part = 32; part > 1; part /= 2)
    if (done >= kFewestChunks && done == group_.chunks / part) results_.expect(slot_, done + group_.threads - 1);
}

// Rounding mode and tiles are set here and not once for all chunks: between two of them a signal handler may run, which
// may scan itself.
template <class Results>
void Scanner<Results>::scan_chunk(int64_t begin, int64_t end) {
  const DefaultFloatEnvironment environment;
  const CheapSession session(group_.bounds.score);
  if (group_.query_codes.empty()) return scan_rows(begin, end);
  const Cells& cells = request_.codes.cells;
  const int64_t in_cells = group_.cell_bounds.empty() ? begin : std::min(end, cells.count * cells.rows);
  if (begin < in_cells) scan_cells(begin / cells.rows, in_cells / cells.rows), begin = in_cells;
  for (int64_t row = begin, stop; row < end; row = stop) {
    stop = std::min(end, row + kStretchBlocks * kBlockRows);
    int64_t survived = 0;
    if (code_pace_.by_codes() && has_thresholds()) survived = scan_codes(row, stop);
    else scan_rows(row, stop);
    code_pace_.judge(survived, (stop - row) * group_.users, [&] { codes_.finish(); });
  }
  codes_.finish();
}

// Where bounds are probable the result consists of what they admit, also of rows that were scored in passing.
template <class Results>
bool Scanner<Results>::admits(int64_t user, int64_t row) {
  return group_.least.empty() || row >= request_.codes.rows() ||
         (request_.filter.allows(group_.first_user + user, row) && codes_.admits(user, row));
}

// Without any, codes rule out nothing.
template <class Results>
bool Scanner<Results>::has_thresholds() {
  for (int64_t user = 0; user < group_.users && !has_thresholds_; ++user)
    has_thresholds_ = results_.threshold(slot_, user) > -std::numeric_limits<float>::infinity();
  return has_thresholds_ || request_.few || request_.scan == ScanMode::kBounded;
}

// By their codes: all but rows behind the last block, and blocks with a replaced row, whose codes may be changing.
// Returns how many pairs survived.
template <class Results>
int64_t Scanner<Results>::scan_codes(int64_t begin, int64_t end) {
  if (request_.blocks && end <= request_.codes.rows() &&
      !request_.blocks->any(begin / kBlockRows, (end - begin) / kBlockRows))
    return 0;
  const int64_t coded = std::max(begin, std::min(end, request_.codes.rows()));
  int64_t survived = 0, row = begin;
  while (row < coded) {
    const int64_t replaced = std::min(coded, group_.next_replaced(row) / kBlockRows * kBlockRows);
    if (row < replaced) survived += codes_.scan(row / kBlockRows, (replaced - row) / kBlockRows);
    row = replaced;
    if (row < coded) scan_rows(row, row + kBlockRows), row += kBlockRows;
  }
  scan_rows(coded, end);
  return survived;
}

// Cells [begin, end) that may hold a row for some user.
template <class Results>
void Scanner<Results>::scan_cells(int64_t begin, int64_t end) {
  const int64_t rows = request_.codes.cells.rows;
  for (int64_t row = group_.next_replaced(begin * rows); row < end * rows; row = group_.next_replaced(row)) {
    row = row / kBlockRows * kBlockRows;
    scan_rows(row, row + kBlockRows), row += kBlockRows;
  }
  CellScanner<Results> scanner(group_, work_, codes_, results_, slot_);
  scanner.scan(begin * rows / kBlockRows, end * rows / kBlockRows,
               [&](int64_t cell) { return group_.cell_bounds.data() + cell * group_.users; });
  group_.count(scanner.counts());
}

// By themselves: bounded first where that is wanted, and pays.
template <class Results>
void Scanner<Results>::scan_rows(int64_t begin, int64_t end) {
  counts_.bytes += (end - begin) * request_.items.columns * element_bytes(request_.items.dtype);
  if (!group_.bounds.score) return scan_exact(begin, end);
  for (int64_t row = begin, stop; row < end; row = stop) {
    stop = std::min(end, row + kStretchRows);
    if (!pace_.next_is_bounded()) {
      scan_exact(row, stop);
      continue;
    }
    rescored_ = 0;
    const int64_t whole_tiles = row + (stop - row) / kLanes * kLanes;
    scan_bounded(row, whole_tiles);
    scan_exact(whole_tiles, stop);
    pace_.judge(rescored_, (whole_tiles - row) * group_.users);
    counts_.scored += rescored_;
  }
}

template <class Results>
void Scanner<Results>::scan_exact(int64_t begin, int64_t end) {
  counts_.scored += (end - begin) * group_.users;
  exact_dots(group_, work_, begin, end,
             [&](int64_t row, int64_t count, const float* dots, int64_t stride) { select(row, count, dots, stride); });
}

template <class Results>
void Scanner<Results>::scan_bounded(int64_t begin, int64_t end) {
  const GroupBounds& bounds = group_.bounds;
  const int64_t wide = bounds.score->panel_rows;
  for (int64_t row = begin; row < end; row += wide) {
    const int64_t count = std::min(wide, end - row);
    for (int64_t column = 0; column < count; column += kLanes) stage_cheap(group_, work_, row + column, column);
    if (request_.bias.data) bias_of(group_, work_, row, count);
    for (const Slice& slice : bounds.slices) {
      bounds.score->dots(work_.cheap_panel.data(), bounds.queries.data() + slice.offset, slice.queries, group_.padded,
                         work_.cheap_dots.data());
      for (int64_t column = 0; column < count; column += kLanes) select_bounded(slice, row + column, column);
    }
  }
}

// Exact scores of one tile for every user.
template <class Results>
void Scanner<Results>::select(int64_t place, int64_t count, const float* dots, int64_t stride) {
  const float* bias = request_.bias.data ? bias_of(group_, work_, place, count) : nullptr;
  const uint32_t rows_present = (1u << count) - 1;
  const auto prune = request_.reduce == Reduce::kLogSumExp ? kernels_.prune_log_sum_exp : kernels_.prune_max;
  float scores[kLanes];
  for (int64_t user = 0; user < group_.users; ++user) {
    const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
    if (!queries) continue;
    const float threshold = results_.threshold(slot_, user);
    uint32_t survivors = rows_present & prune(dots + first * stride, stride, queries, bias, threshold, scores);
    for (uint32_t left = group_.least.empty() ? 0 : survivors; left; left &= left - 1)
      if (!admits(user, place + __builtin_ctz(left))) survivors &= ~(left & -left);
    if (survivors) results_.take(slot_, user, place, survivors, scores);
  }
}

// Upper bounds of one tile for the users of a slice, and exact scores of the survivors.
template <class Results>
void Scanner<Results>::select_bounded(const Slice& slice, int64_t place, int64_t column) {
  const int64_t stride = group_.bounds.score->panel_rows;
  const float* scales = work_.scales.data() + column;
  const float* lengths = work_.lengths.data() + column;
  const float* bias = request_.bias.data ? work_.bias.data() + column : nullptr;
  for (int64_t user = slice.first_user; user < slice.last_user; ++user) {
    const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
    if (!queries) continue;
    const float* cheap = work_.cheap_dots.data() + (first - slice.first_query) * stride + column;
    const float* slack = group_.bounds.slack.data() + first;
    float relative = 0, offset = 0;
    if (request_.reduce == Reduce::kLogSumExp) log_sum_exp_excess(queries, &relative, &offset);
    uint32_t survivors = kernels_.prune_bound(cheap, stride, queries, slack, scales, lengths, relative, offset, bias,
                                              results_.threshold(slot_, user));
    for (; survivors; survivors &= survivors - 1) {
      const int i = __builtin_ctz(survivors);
      const int64_t row = group_.row_at(place + i);
      if (!request_.filter.allows(group_.first_user + user, row)) continue;
      ++rescored_;
      const Bounded bounded{cheap + i, scales[i], lengths[i]};
      float score;
      if (rescore(user, place + i, bounded, bias ? bias[i] : 0.0f, results_.threshold(slot_, user), &score) &&
          admits(user, place + i))
        results_.take_one(slot_, user, row, score);
    }
  }
}

// The exact score of a survivor; false where it is NaN or below the threshold. Under max only queries whose own bound
// reaches the threshold are asked: if the score reaches it, the winner is among them. All are where the row is not
// finite, as in prune_bound.
template <class Results>
bool Scanner<Results>::rescore(int64_t user, int64_t place, const Bounded& bounded, float bias, float threshold,
                               float* score) {
  const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
  const float* slack = group_.bounds.slack.data() + first;
  int32_t* chosen = work_.chosen.data();
  int64_t count = 0;
  for (int64_t m = 0; m < queries; ++m) {
    const float cheap = bounded.cheap[m * group_.bounds.score->panel_rows];
    const float bound = bounded.scale * (cheap + slack[m] * bounded.length);
    if (!(bound + bias < threshold)) chosen[count++] = static_cast<int32_t>(m);
  }
  return exact_score(group_, work_, user, place, chosen, count, bias, score) && *score >= threshold;
}

template class Scanner<TopKResults>;
template class Scanner<PartitionResults>;

}  // namespace urm
