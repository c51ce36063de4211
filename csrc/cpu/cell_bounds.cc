#include "cell_bounds.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "float_environment.h"
#include "promising.h"
#include "run_scan.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kSampleStep = 16;    // of blocks of cells; their bounds are 0.1 % of a scan
constexpr int64_t kFewestSampled = 8;  // blocks of cells
constexpr double kMostLeft = 0.9;      // of the pairs (user, cell): more, and the level does not pay
constexpr int64_t kUsersAsked = 16;
constexpr int64_t kRoom = 2;  // for as many as are wanted: these are cut back less often
// Cells scanned first: so many beside those that k rows fill, of which as many: not all rows of a promising cell are
// good. And no more than one of so many, or a few, in a small table.
constexpr int64_t kMoreCells = 128;
constexpr int64_t kCellsFor = 128;
constexpr int64_t kCellsOfOne = 16;
constexpr int64_t kFewestCells = 16;

// Codes of cells, as those of a table of their own.
Codes codes_of_cells(const Codes& codes) {
  Codes out;
  out.bits = kCellBits;
  out.blocks = codes.cells.blocks;
  out.count = (codes.cells.count + kBlockRows - 1) / kBlockRows;
  out.rotation = codes.rotation;
  out.lost_reference = codes.cells.lost_reference;
  out.norm_reference = codes.cells.norm_reference;
  return out;
}

// Bounds of all cells, or of a sample: every step-th block of them.
class CellBounder {
 public:
  explicit CellBounder(Group& group)
      : group_(group),
        cells_(group.request.codes.cells),
        codes_(codes_of_cells(group.request.codes)),
        queries_(encode_queries(group.packed, group.users, group.padded, codes_, *group.request.kernels)),
        blocks_(codes_.count) {}

  void sample(int64_t step) {
    step_ = step;
    blocks_ = (codes_.count + step - 1) / step;
  }

  int64_t cells() const { return step_ == 1 ? cells_.count : blocks_ * kBlockRows; }
  int64_t cell_at(int64_t i) const { return i / kBlockRows * step_ * kBlockRows + i % kBlockRows; }

  // Cells whose best rows are likely to be about the k best of all.
  int64_t most_promising(int64_t k) const {
    const int64_t filled = (k + cells_.rows - 1) / cells_.rows;
    return std::min({cells(), kCellsFor * filled + kMoreCells, filled + std::max(cells() / kCellsOfOne, kFewestCells)});
  }

  // bounds [cells()][users]; best: the cells of the largest, by their place among these.
  void run(std::vector<Workspace>& work, TopKResults* best, float* bounds) {
    std::atomic<int64_t> next{0};
    const int threads = group_.threads_for(kPassCost * multiply_adds(group_, cells()));
    run_parallel(static_cast<int>(std::min<int64_t>(threads, blocks_)), [&](int slot) {
      const DefaultFloatEnvironment environment;
      for (int64_t block; (block = next.fetch_add(kStretchBlocks, std::memory_order_relaxed)) < blocks_;)
        for (int64_t user = 0; user < group_.users; ++user)
          of_blocks(block, std::min(blocks_, block + kStretchBlocks), user, slot, work[slot], best, bounds);
      if (best) best->publish(slot);
    });
    if (best) best->settle();
  }

 private:
  // Blocks [first, last) of those that are asked, at most a stretch.
  void of_blocks(int64_t first, int64_t last, int64_t user, int slot, Workspace& work, TopKResults* best, float* out) {
    const ScanRequest& request = group_.request;
    const int64_t r = request.items.columns, queries = group_.packed.start[user + 1] - group_.packed.start[user];
    const int64_t begin = first * kBlockRows, end = std::min(cells(), last * kBlockRows);
    float bounds[kStretchBlocks * kBlockRows];
    uint32_t reach[kStretchBlocks] = {};
    if (!queries) {
      for (int64_t i = begin; i < end; ++i) out[i * group_.users + user] = kNothing;
      return;
    }
    const int64_t quads = quads_of(r), at = queries_.first_group[user] * kLanes;
    const int64_t stride = step_ * block_bytes(r, codes_.bits);
    const char* codes = codes_.blocks + first * stride;
    const int64_t more = step_ == 1 ? std::min(kStretchBlocks, blocks_ - last) : 0;
    const Ahead ahead{codes_.blocks + last * stride, user ? 0 : more * stride / kCacheLine};
    request.kernels->codes->largest4(codes, stride, last - first, quads, queries_.codes.data() + at * quads * kQuad,
                                     queries_.starts.data() + at, queries, ahead, work.largest_sums.data());
    float relative = 0, offset = 0;
    if (request.reduce == Reduce::kLogSumExp) log_sum_exp_excess(queries, &relative, &offset);
    const float least = best ? best->threshold(slot, user) : kNothing;
    request.kernels->prune_codes(work.largest_sums.data(), (queries + kLanes - 1) / kLanes,
                                 codes + block_code_bytes(r, codes_.bits), stride, last - first, queries_.bounds[user],
                                 relative, offset, cells_.bias ? bias_of(first, last, work) : nullptr, least, bounds,
                                 reach);
    for (int64_t i = begin; i < end; ++i) {
      float& bound = bounds[i - begin];
      if (bound != bound) bound = std::numeric_limits<float>::infinity();
      bound = cell_at(i) < cells_.count ? std::max(bound, std::numeric_limits<float>::lowest()) : kNothing;
      out[i * group_.users + user] = bound;
    }
    for (int64_t b = 0; b < last - first && best; ++b)
      for (uint32_t left = reach[b]; left; left &= left - 1) {
        const int64_t i = begin + b * kBlockRows + __builtin_ctz(left);
        if (i >= end) break;
        const float bound = out[i * group_.users + user];
        if (reaches(bound, best->threshold(slot, user))) best->take_one(slot, user, i, bound);
      }
  }

  const float* bias_of(int64_t first, int64_t last, Workspace& work) const {
    for (int64_t i = first * kBlockRows; i < last * kBlockRows; ++i)
      work.bias[i - first * kBlockRows] = cell_at(i) < cells_.count ? cells_.bias[cell_at(i)] : 0.0f;
    return work.bias.data();
  }

  Group& group_;
  const Cells& cells_;
  const Codes codes_;
  const QueryCodes queries_;
  int64_t step_ = 1, blocks_;
};

// Of each user, k exact scores among the most promising rows of the most promising cells: thresholds that k rows reach.
void score_best_cells(Group& group, std::vector<Workspace>& work, const CellBounder& bounder, TopKResults& cells,
                      int64_t k, TopKResults& found) {
  const int64_t of_cell = group.request.codes.cells.rows / kBlockRows;
  const int64_t most = std::max<int64_t>(1, bounder.most_promising(k));
  const auto first_block = [&](uint64_t key) { return bounder.cell_at(key_row(key)) * of_cell; };
  const int threads = group.threads_for(kPassCost * multiply_adds(group, most * group.request.codes.cells.rows));
  score_most_promising(group, work, k, threads, most, found, [&](int64_t user, int64_t i, auto& scanner) {
    TopKBuffer& best = cells.best(user);
    if (i >= best.size()) return;
    const int64_t first = first_block(best.keys()[i]), end = first + of_cell;
    Ahead ahead{nullptr, 0};
    if (i + 1 < best.size()) ahead = scanner.memory_of(first_block(best.keys()[i + 1]), of_cell);
    if (group.next_replaced(first * kBlockRows) < end * kBlockRows) return;
    for (int64_t block = first; block < end; block += kStretchBlocks, ahead = {nullptr, 0})
      scanner.take_bounds(user, block, std::min(kStretchBlocks, end - block), ahead);
  });
}

// Whether a sample of the cells says that most will be ruled out: by the score that the sample's share of the k best
// reaches.
bool cells_pay(const TopKRequest& request, Group& group, std::vector<Workspace>& work) {
  CellBounder bounder(group);
  const int64_t blocks = (request.codes.cells.count + kBlockRows - 1) / kBlockRows;
  const int64_t step = std::clamp<int64_t>(blocks / kFewestSampled, 1, kSampleStep);
  const int64_t k = std::max<int64_t>(1, std::min(request.k, request.items.rows) / step);
  bounder.sample(step);
  AlignedVector<float> bounds(bounder.cells() * group.users);
  TopKResults cells(group, bounder.most_promising(k), kRoom * bounder.most_promising(k));
  bounder.run(work, &cells, bounds.data());
  TopKResults found(group, k, topk_buffer_capacity(k, request.items.rows));
  score_best_cells(group, work, bounder, cells, k, found);
  int64_t left = 0;
  for (int64_t i = 0; i < bounder.cells(); ++i)
    for (int64_t user = 0; user < group.users; ++user)
      left += reaches(bounds[i * group.users + user], found.best(user).threshold());
  return static_cast<double>(left) < kMostLeft * static_cast<double>(bounds.size());
}

}  // namespace

AlignedVector<float> bounds_of_cells(Group& group, std::vector<Workspace>& work) {
  CellBounder bounder(group);
  AlignedVector<float> bounds(bounder.cells() * group.users);
  bounder.run(work, nullptr, bounds.data());
  return bounds;
}

void use_cells(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results) {
  const Cells& cells = request.codes.cells;
  if (!cells.count || group.query_codes.empty() || !request.k) return;
  if (request.bias.data && !cells.bias) return;  // a bias of this call's own, which the cells do not know
  if (request.scan != ScanMode::kBounded && group.users <= kUsersAsked) {
    if (!cells_pay(request, group, work)) return;
  } else if (request.scan != ScanMode::kBounded) {
    Group some(request, group.first_user, group.first_user + kUsersAsked, group.padded);
    std::vector<Workspace> work_of_some = workspaces(some);
    if (!cells_pay(request, some, work_of_some)) return;
  }
  CellBounder bounder(group);
  const int64_t k = std::min(request.k, request.items.rows);
  group.cell_bounds.resize(cells.count * group.users);
  const int64_t most = bounder.most_promising(k);
  TopKResults best(group, most, kRoom * most);
  bounder.run(work, &best, group.cell_bounds.data());
  TopKResults found(group, k, topk_buffer_capacity(k, request.items.rows));
  score_best_cells(group, work, bounder, best, k, found);
  for (int64_t user = 0; user < group.users; ++user) results.raise_floor(user, found.best(user).floor());
}

}  // namespace urm
