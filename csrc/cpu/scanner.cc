#include "scanner.h"

#include <algorithm>
#include <limits>

#include "../common/log_sum_exp.h"

namespace urm {
namespace {

constexpr int64_t kCachedBytes = 1 << 20;  // a table that stays in the second-level cache gains nothing by prefetching
constexpr int64_t kCacheLine = 64;
constexpr int64_t kStretchRows = 288;  // whole panels of 16, 32 and 48 rows; the pace is set anew for each

// A cheap score's preparation of the thread, for the life of a scope.
class CheapSession {
 public:
  explicit CheapSession(const CheapScore* score) : score_(score) {
    if (score_ && score_->enter) score_->enter();
  }
  ~CheapSession() {
    if (score_ && score_->leave) score_->leave();
  }
  CheapSession(const CheapSession&) = delete;
  CheapSession& operator=(const CheapSession&) = delete;

 private:
  const CheapScore* score_;
};

}  // namespace

Workspace::Workspace(const Group& group) {
  const Kernels& kernels = *group.request.kernels;
  const CheapScore* cheap = group.bounds.score;
  const int64_t wide = std::max(kernels.panel_rows, cheap ? cheap->panel_rows : 0);
  rows.resize(kLanes * group.padded);
  if (!group.direct()) panel.resize(kernels.panel_rows * group.padded);
  dots.resize(round_up(group.packed.total, kQueryGroup) * kernels.panel_rows);
  bias.resize(wide);
  if (!cheap) return;
  cheap_panel.resize(cheap_bytes(*cheap, cheap->panel_rows, group.padded));
  cheap_dots.resize(group.bounds.widest * cheap->panel_rows);
  lengths.resize(cheap->panel_rows);
  row.resize(group.padded);
  user_dots.resize(group.packed.total);
}

void Scanner::run() {
  const CheapSession session(group_.bounds.score);
  const int64_t n = request_.items.rows;
  for (;;) {
    const int64_t begin = group_.next_chunk.fetch_add(1, std::memory_order_relaxed) * group_.chunk_rows;
    if (begin >= n || group_.stop.load(std::memory_order_relaxed)) return;
    adopt_floors();
    scan(begin, std::min(n, begin + group_.chunk_rows));
    publish_floors();
    if (slot_ == 0 && request_.interrupted && request_.interrupted())
      group_.stop.store(true, std::memory_order_relaxed);
  }
}

void Scanner::scan(int64_t begin, int64_t end) {
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
  }
}

void Scanner::scan_exact(int64_t begin, int64_t end) {
  if (group_.direct()) scan_rows(begin, end);
  else scan_panels(begin, end);
}

void Scanner::scan_rows(int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - row);
    int64_t stride;
    const float* rows = tile(row, count, &stride);
    kernels_.dots_of_rows(rows, stride, group_.packed.rows.data(), group_.packed.total, group_.padded,
                          ahead(row + kLanes, kLanes), work_.dots.data());
    select(row, count, work_.dots.data(), kLanes);
  }
}

void Scanner::scan_panels(int64_t begin, int64_t end) {
  const int64_t wide = kernels_.panel_rows;
  for (int64_t row = begin; row < end; row += wide) {
    for (int64_t column = 0; column < wide; column += kLanes) {
      int64_t stride;
      const float* rows = tile(row + column, std::clamp<int64_t>(end - row - column, 0, kLanes), &stride);
      kernels_.transpose(rows, stride, group_.padded, static_cast<int>(column), work_.panel.data());
    }
    kernels_.dots_of_panel(work_.panel.data(), group_.panel.data(), group_.packed.total, group_.padded,
                           ahead(row + wide, wide), work_.dots.data());
    for (int64_t column = 0; column < wide && row + column < end; column += kLanes)
      select(row + column, std::min<int64_t>(kLanes, end - row - column), work_.dots.data() + column, wide);
  }
}

void Scanner::scan_bounded(int64_t begin, int64_t end) {
  const GroupBounds& bounds = group_.bounds;
  const int64_t wide = bounds.score->panel_rows;
  for (int64_t row = begin; row < end; row += wide) {
    const int64_t count = std::min(wide, end - row);
    for (int64_t column = 0; column < count; column += kLanes) stage_cheap(row + column, column);
    if (request_.bias.data) load_bias(row, count);
    for (const Slice& slice : bounds.slices) {
      bounds.score->dots(work_.cheap_panel.data(), bounds.queries.data() + slice.offset, slice.queries, group_.padded,
                         work_.cheap_dots.data());
      for (int64_t column = 0; column < count; column += kLanes)
        select_bounded(slice, row + column, column);
    }
  }
}

// 16 padded fp32 rows: the table itself where it has that form, else widened into the workspace.
const float* Scanner::tile(int64_t row, int64_t count, int64_t* stride) {
  const MatrixView& items = request_.items;
  if (items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == group_.padded && count == kLanes) {
    *stride = items.row_stride;
    return reinterpret_cast<const float*>(row_address(items, row));
  }
  kernels_.stage(items, row, count, group_.padded, work_.rows.data());
  *stride = group_.padded;
  return work_.rows.data();
}

void Scanner::stage_cheap(int64_t row, int64_t column) {
  const MatrixView& items = request_.items;
  const CheapScore& cheap = *group_.bounds.score;
  const void* rows = row_address(items, row);
  int64_t stride_bytes = items.row_stride * element_bytes(items.dtype);
  if (group_.bounds.rows == DType::kFloat32) {
    int64_t stride;
    rows = tile(row, kLanes, &stride);
    stride_bytes = stride * static_cast<int64_t>(sizeof(float));
  }
  cheap.stage(rows, group_.bounds.rows, stride_bytes, group_.padded, static_cast<int>(column),
              ahead(row + cheap.panel_rows, kLanes), work_.cheap_panel.data(), work_.lengths.data() + column);
}

// Where rows follow each other without a gap, the memory of `count` of them.
Ahead Scanner::ahead(int64_t row, int64_t count) const {
  const MatrixView& items = request_.items;
  if (items.column_stride != 1 || items.row_stride != items.columns || row + count > items.rows) return {nullptr, 0};
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  if (items.rows * row_bytes <= kCachedBytes) return {nullptr, 0};
  return {row_address(items, row), count * row_bytes / kCacheLine};
}

// Exact scores of one tile for every user, and what may still win into the user's buffer.
void Scanner::select(int64_t row, int64_t count, const float* dots, int64_t stride) {
  const float* bias = request_.bias.data ? load_bias(row, count) : nullptr;
  const uint32_t rows_present = (1u << count) - 1;
  const auto prune = request_.reduce == Reduce::kLogSumExp ? kernels_.prune_log_sum_exp : kernels_.prune_max;
  float scores[kLanes];
  for (int64_t user = 0; user < group_.users; ++user) {
    const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
    if (!queries) continue;
    TopKBuffer& buffer = group_.buffer(slot_, user);
    uint32_t survivors =
        rows_present & prune(dots + first * stride, stride, queries, bias, buffer.threshold(), scores);
    for (; survivors; survivors &= survivors - 1) {
      const int i = __builtin_ctz(survivors);
      const uint64_t key = pack_key(scores[i], static_cast<uint32_t>(row + i));
      if (key >= buffer.floor() && request_.filter.allows(group_.first_user + user, row + i)) buffer.push(key);
    }
  }
}

// Upper bounds of one tile for the users of a slice, and exact scores of the survivors.
void Scanner::select_bounded(const Slice& slice, int64_t row, int64_t column) {
  const int64_t stride = group_.bounds.score->panel_rows;
  const float* lengths = work_.lengths.data() + column;
  const float* bias = request_.bias.data ? work_.bias.data() + column : nullptr;
  for (int64_t user = slice.first_user; user < slice.last_user; ++user) {
    const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
    if (!queries) continue;
    const float* dots = work_.cheap_dots.data() + (first - slice.first_query) * stride + column;
    const float* slack = group_.bounds.slack.data() + first;
    float relative = 0, offset = 0;
    if (request_.reduce == Reduce::kLogSumExp) log_sum_exp_excess(queries, &relative, &offset);
    TopKBuffer& buffer = group_.buffer(slot_, user);
    uint32_t survivors = kernels_.prune_bound(dots, stride, queries, slack, lengths, relative, offset,
                                                             bias, buffer.threshold());
    for (; survivors; survivors &= survivors - 1) {
      const int i = __builtin_ctz(survivors);
      if (!request_.filter.allows(group_.first_user + user, row + i)) continue;
      ++rescored_;
      float score;
      if (!rescore(user, row + i, dots + i, lengths[i], bias ? bias[i] : 0.0f, buffer.threshold(), &score)) continue;
      const uint64_t key = pack_key(score, static_cast<uint32_t>(row + i));
      if (key >= buffer.floor()) buffer.push(key);
    }
  }
}

// The exact score of a survivor; false where it is NaN or below the threshold. Under max only queries whose own bound
// reaches the threshold are asked: if the score reaches it, the winner is among them.
bool Scanner::rescore(int64_t user, int64_t row, const float* cheap, float length, float bias, float threshold,
                      float* score) {
  const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
  const int64_t stride = group_.bounds.score->panel_rows, padded = group_.padded;
  const float* query = group_.packed.rows.data() + first * padded;
  const float* slack = group_.bounds.slack.data() + first;
  const float* factors = whole_row(row);
  if (request_.reduce == Reduce::kLogSumExp) {
    for (int64_t m = 0; m < queries; ++m)
      work_.user_dots[m] = kernels_.dot(factors, query + m * padded, padded);
    *score = canonical_log_sum_exp(work_.user_dots.data(), 1, queries);
  } else {
    const bool bounded = length - length == 0.0f;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t m = 0; m < queries; ++m) {
      if (bounded && cheap[m * stride] + slack[m] * length + bias < threshold) continue;
      const float dot = kernels_.dot(factors, query + m * padded, padded);
      if (dot != dot) return false;
      largest = std::max(largest, dot);
    }
    *score = largest;
  }
  if (request_.bias.data) *score += bias;
  *score += 0.0f;  // -0 becomes +0
  return *score >= threshold;
}

const float* Scanner::whole_row(int64_t row) {
  const MatrixView& items = request_.items;
  if (items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == group_.padded)
    return reinterpret_cast<const float*>(row_address(items, row));
  MatrixView one = items;
  one.data = row_address(items, row);
  one.rows = 1;
  kernels_.widen(one, group_.padded, work_.row.data());
  return work_.row.data();
}

const float* Scanner::load_bias(int64_t row, int64_t count) {
  MatrixView part = request_.bias;
  part.data = static_cast<const char*>(part.data) + row * part.column_stride * element_bytes(part.dtype);
  part.columns = count;
  kernels_.widen(part, round_up(count, kLanes), work_.bias.data());
  return work_.bias.data();
}

void Scanner::adopt_floors() {
  for (int64_t user = 0; user < group_.users; ++user)
    group_.buffer(slot_, user).raise_floor(group_.floors[user].load(std::memory_order_relaxed));
}

void Scanner::publish_floors() {
  for (int64_t user = 0; user < group_.users; ++user)
    raise_shared_floor(group_.floors[user], group_.buffer(slot_, user).floor());
}

}  // namespace urm
