#include "cell_bounds.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "float_environment.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kSampleStep = 16;       // of blocks of cells; their bounds are 0.1 % of a scan
constexpr int64_t kFewestSampled = 8;     // blocks of cells
constexpr double kMostLeft = 0.5;         // of the pairs (user, cell): more, and the level does not pay
constexpr int64_t kMoreCells = 4;         // scanned first, beside those that k rows fill
constexpr int64_t kCellsFor = 2;          // as many as k rows fill: not all rows of a promising cell are good

// Codes of cells, as those of a table of their own.
Codes codes_of_cells(const Codes& codes) {
  Codes out;
  out.bits = codes.cells.bits;
  out.blocks = codes.cells.blocks;
  out.count = (codes.cells.count + kBlockRows - 1) / kBlockRows;
  out.rotation = codes.rotation;
  out.lost_reference = codes.cells.lost_reference;
  out.norm_reference = codes.cells.norm_reference;
  return out;
}

// Bounds of every step-th block of cells.
class CellBounder {
 public:
  CellBounder(Group& group, int64_t step)
      : group_(group),
        cells_(group.request.codes.cells),
        codes_(codes_of_cells(group.request.codes)),
        queries_(encode_queries(group.packed, group.users, group.padded, codes_, *group.request.kernels)),
        step_(step),
        blocks_((codes_.count + step - 1) / step) {}

  int64_t cells() const { return step_ == 1 ? cells_.count : blocks_ * kBlockRows; }
  int64_t cell_at(int64_t i) const { return i / kBlockRows * step_ * kBlockRows + i % kBlockRows; }

  // bounds [cells()][users]; best: the cells of the largest, by their place among these.
  void run(std::vector<Workspace>& work, TopKResults* best, float* bounds) {
    std::atomic<int64_t> next{0};
    run_parallel(static_cast<int>(std::min<int64_t>(group_.threads, blocks_)), [&](int slot) {
      const DefaultFloatEnvironment environment;
      for (int64_t block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks_;)
        for (int64_t user = 0; user < group_.users; ++user) of_block(block, user, slot, work[slot], best, bounds);
      if (best) best->publish(slot);
    });
    if (best) best->settle();
  }

 private:
  void of_block(int64_t block, int64_t user, int slot, Workspace& work, TopKResults* best, float* out) {
    const ScanRequest& request = group_.request;
    const int64_t r = request.items.columns, queries = group_.packed.start[user + 1] - group_.packed.start[user];
    const int64_t first = block * step_ * kBlockRows, here = block * kBlockRows;
    const int64_t count = std::clamp<int64_t>(cells_.count - first, 0, kBlockRows);
    float bounds[kBlockRows], bias[kBlockRows] = {};
    if (queries) {
      const char* codes = codes_.blocks + block * step_ * block_bytes(r, codes_.bits);
      const int64_t quads = quads_of(r), at = queries_.first_group[user] * kLanes;
      const auto largest =
          codes_.bits == 4 ? request.kernels->codes->largest4 : request.kernels->codes->largest8;
      largest(codes, 0, 1, quads, queries_.codes.data() + at * quads * kQuad, queries_.starts.data() + at, queries,
              Ahead{nullptr, 0}, work.largest_sums.data());
      float relative = 0, offset = 0;
      if (request.reduce == Reduce::kLogSumExp) log_sum_exp_excess(queries, &relative, &offset);
      if (cells_.bias) std::copy(cells_.bias + first, cells_.bias + first + count, bias);
      uint32_t all;
      request.kernels->prune_codes(work.largest_sums.data(), (queries + kLanes - 1) / kLanes,
                                   codes + block_code_bytes(r, codes_.bits), 0, 1, queries_.bounds[user], relative,
                                   offset, cells_.bias ? bias : nullptr, kNothing, bounds, &all);
    }
    const int64_t blocks = cells_.rows / kBlockRows;
    for (int64_t i = 0; i < kBlockRows && here + i < cells(); ++i) {
      float bound = kNothing;
      if (queries && i < count) {
        bound = bounds[i] == bounds[i] ? bounds[i] : std::numeric_limits<float>::infinity();
        bound = std::max(bound, std::numeric_limits<float>::lowest());
      }
      if (bound != kNothing && !any_allowed(user, (first + i) * blocks, blocks)) bound = kNothing;
      out[(here + i) * group_.users + user] = bound;
      if (best && reaches(bound, best->threshold(slot, user))) best->take_one(slot, user, here + i, bound);
    }
  }

  bool any_allowed(int64_t user, int64_t first_block, int64_t blocks) const {
    for (int64_t block = 0; block < blocks; block += kStretchBlocks)
      if (group_.blocks.among(user, first_block + block, 1, std::min(kStretchBlocks, blocks - block))) return true;
    return false;
  }

  Group& group_;
  const Cells& cells_;
  const Codes codes_;
  const QueryCodes queries_;
  const int64_t step_, blocks_;
};

int64_t most_promising(int64_t k, const Cells& cells) {
  return std::min(cells.count, kCellsFor * ((k + cells.rows - 1) / cells.rows) + kMoreCells);
}

// Scans each user's most promising cells, and marks them as done.
void scan_best(Group& group, std::vector<Workspace>& work, const CellBounder& bounder, TopKResults& best,
               TopKResults& results, float* bounds) {
  std::vector<std::pair<int64_t, int64_t>> pairs;  // (cell, user)
  for (int64_t user = 0; user < group.users; ++user)
    for (int64_t i = 0; i < best.best(user).size(); ++i) pairs.emplace_back(key_row(best.best(user).keys()[i]), user);
  std::sort(pairs.begin(), pairs.end());
  std::vector<std::size_t> starts;  // of each cell's pairs
  for (std::size_t i = 0; i < pairs.size(); ++i)
    if (!i || pairs[i].first != pairs[i - 1].first) starts.push_back(i);
  starts.push_back(pairs.size());
  const int64_t cells = static_cast<int64_t>(starts.size()) - 1;
  std::atomic<int64_t> next{0};
  std::vector<AlignedVector<float>> wanted(group.threads);
  for (auto& one : wanted) {
    one.resize(group.users);
    std::fill(one.begin(), one.end(), kNothing);
  }
  run_parallel(static_cast<int>(std::clamp<int64_t>(cells, 1, group.threads)), [&](int slot) {
    const DefaultFloatEnvironment environment;
    CodeScanner<TopKResults> scanner(group, work[slot], results, slot);
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < cells;) {
      results.adopt(slot);
      const int64_t cell = pairs[starts[i]].first;
      const int64_t then = i + 1 < cells ? bounder.cell_at(pairs[starts[i + 1]].first) : -1;
      for (std::size_t at = starts[i]; at < starts[i + 1]; ++at)
        wanted[slot][pairs[at].second] = std::numeric_limits<float>::infinity();
      scan_cell(group, scanner, bounder.cell_at(cell), wanted[slot].data(), then);
      for (std::size_t at = starts[i]; at < starts[i + 1]; ++at) {
        wanted[slot][pairs[at].second] = kNothing;
        bounds[cell * group.users + pairs[at].second] = kNothing;
      }
    }
    scanner.finish();
    results.publish(slot);
    group.count(scanner.counts());
  });
  results.settle();
}

// Whether a sample of the cells says that most will be ruled out: by the score that the sample's share of the k best
// reaches, which the most promising of its cells have.
bool cells_pay(const TopKRequest& request, Group& group, std::vector<Workspace>& work) {
  const Cells& cells = request.codes.cells;
  const int64_t blocks = (cells.count + kBlockRows - 1) / kBlockRows;
  const int64_t step = std::clamp<int64_t>(blocks / kFewestSampled, 1, kSampleStep);
  const int64_t k = std::max<int64_t>(1, std::min(request.k, request.items.rows) / step);
  CellBounder bounder(group, step);
  AlignedVector<float> bounds(bounder.cells() * group.users);
  const int64_t first = std::min(most_promising(k, cells), bounder.cells());
  TopKResults best(group, first, topk_buffer_capacity(first, bounder.cells()));
  bounder.run(work, &best, bounds.data());
  const AlignedVector<float> before = bounds;
  TopKResults results(group, k, topk_buffer_capacity(k, request.items.rows));
  scan_best(group, work, bounder, best, results, bounds.data());
  int64_t left = 0;
  for (int64_t i = 0; i < bounder.cells(); ++i)
    for (int64_t user = 0; user < group.users; ++user)
      left += reaches(before[i * group.users + user], results.best(user).threshold());
  return static_cast<double>(left) < kMostLeft * static_cast<double>(before.size());
}

}  // namespace

AlignedVector<float> bounds_of_cells(Group& group, std::vector<Workspace>& work) {
  CellBounder bounder(group, 1);
  AlignedVector<float> bounds(bounder.cells() * group.users);
  bounder.run(work, nullptr, bounds.data());
  return bounds;
}

void use_cells(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results) {
  const Cells& cells = request.codes.cells;
  if (!cells.count || group.query_codes.empty() || !request.k) return;
  if (request.bias.data && !cells.bias) return;  // a bias of this call's own, which the cells do not know
  if (request.scan != ScanMode::kBounded && !cells_pay(request, group, work)) return;
  CellBounder bounder(group, 1);
  group.cell_bounds.resize(cells.count * group.users);
  const int64_t first = most_promising(std::min(request.k, request.items.rows), cells);
  TopKResults best(group, first, topk_buffer_capacity(first, cells.count));
  bounder.run(work, &best, group.cell_bounds.data());
  scan_best(group, work, bounder, best, results, group.cell_bounds.data());
}

}  // namespace urm
