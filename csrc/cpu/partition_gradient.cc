#include "partition_gradient.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "exact_dots.h"
#include "float_environment.h"
#include "thread_pool.h"

namespace urm {
namespace {

// Rows are cut into shares whatever the number of threads, each share's sums are formed in ascending order of rows, and
// the shares' in theirs: that fixes every rounding.
constexpr int64_t kMostShares = 16, kFewestShares = 4;
constexpr int64_t kShareBytes = 16 << 20;  // of all shares together, where that is not below the fewest
constexpr int64_t kBlockRows = 3072;  // whole panels whose gradients of queries are added in float32, then in float64

struct Share {
  AlignedVector<double> grad_packed{};  // [queries, padded]
  double grad_temperature = 0;
};

// One thread's working memory.
struct GradientWork {
  Workspace scan;
  AlignedVector<float> block{};  // gradients of the packed queries, [queries, padded]
  // Of one tile: every user's lanes that take part, their shares and under max their winners, [users, 16]; under
  // logsumexp the weights of the queries, [queries, 16].
  AlignedVector<uint32_t> lanes{};
  AlignedVector<float> shares{}, weights{};
  AlignedVector<int32_t> winners{};
  // Of one row: queries that it has a part in, and by what factor; its gradient.
  AlignedVector<int32_t> chosen{};
  AlignedVector<float> factors{}, grad_row{};

  explicit GradientWork(const Group& group) : scan(group) {
    const int64_t total = group.packed.total;
    block.resize(total * group.padded);
    lanes.resize(group.users);
    shares.resize(group.users * kLanes);
    winners.resize(group.users * kLanes);
    if (group.request.reduce == Reduce::kLogSumExp) weights.resize(total * kLanes);
    chosen.resize(total);
    factors.resize(total);
    grad_row.resize(group.padded);
  }
};

class Gradient {
 public:
  Gradient(const PartitionGradientRequest& request, Group& group, GradientWork& work, Share& share)
      : request_(request),
        group_(group),
        kernels_(*request.kernels),
        work_(work),
        share_(share),
        log_sum_exp_(request.reduce == Reduce::kLogSumExp) {}

  void run(int64_t begin, int64_t end, int slot) {
    std::fill(share_.grad_packed.begin(), share_.grad_packed.end(), 0.0);
    for (int64_t row = begin; row < end && !group_.stop.load(std::memory_order_relaxed); row += kBlockRows) {
      add_block(row, std::min(end, row + kBlockRows));
      if (slot == 0 && request_.interrupted && request_.interrupted()) group_.stop.store(true);
    }
  }

 private:
  void add_block(int64_t begin, int64_t end) {
    const DefaultFloatEnvironment environment;
    std::fill(work_.block.begin(), work_.block.end(), 0.0f);
    exact_dots(group_, work_.scan, begin, end, [&](int64_t row, int64_t count, const float* dots, int64_t stride) {
      if (const uint32_t any = find_shares(row, count, dots, stride)) add_rows(row, count, any);
    });
    for (size_t e = 0; e < work_.block.size(); ++e) share_.grad_packed[e] += static_cast<double>(work_.block[e]);
  }

  // The rows of a tile that have a share in any user's sum.
  uint32_t find_shares(int64_t row, int64_t count, const float* dots, int64_t stride) {
    const float* bias = request_.bias.data ? bias_of(group_, work_.scan, row, count) : nullptr;
    float scores[kLanes], grad_bias[kLanes] = {};
    uint32_t any = 0;
    for (int64_t user = 0; user < group_.users; ++user) {
      const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
      const float logarithm = request_.logarithms[group_.first_user + user];
      const float factor = request_.grad[group_.first_user + user] / request_.temperature;
      work_.lanes[user] = 0;
      if (!queries || !std::isfinite(logarithm) || factor == 0) continue;
      uint32_t lanes = request_.filter.allowed(group_.first_user + user, row, (1u << count) - 1);
      if (!lanes) continue;
      float* shares = work_.shares.data() + user * kLanes;
      const float* of_user = dots + first * stride;
      if (log_sum_exp_)
        lanes = kernels_.shares_log_sum_exp(of_user, stride, queries, bias, request_.temperature, logarithm, factor,
                                            lanes, scores, shares, work_.weights.data() + first * kLanes);
      else
        lanes = kernels_.shares_max(of_user, stride, queries, bias, request_.temperature, logarithm, factor, lanes,
                                    scores, shares, work_.winners.data() + user * kLanes);
      any |= work_.lanes[user] = lanes;
      for (; lanes; lanes &= lanes - 1) {
        const int i = __builtin_ctz(lanes);
        grad_bias[i] += shares[i];
        share_.grad_temperature -= static_cast<double>(shares[i]) * static_cast<double>(scores[i]);
      }
    }
    if (request_.grad_bias)
      for (int64_t i = 0; i < count; ++i) request_.grad_bias[row + i] += grad_bias[i];
    return any;
  }

  void add_rows(int64_t row, int64_t count, uint32_t any) {
    int64_t stride;
    const float* rows = tile_of(group_, work_.scan, row, count, &stride);
    const float* scales = request_.row_scale.data ? row_scale_of(group_, work_.scan, row, count) : nullptr;
    for (; any; any &= any - 1) {
      const int i = __builtin_ctz(any);
      const int64_t chosen = choose(i, scales ? scales[i] : 1.0f);
      kernels_.add_products(rows + i * stride, group_.packed.rows.data(), group_.padded, work_.chosen.data(),
                            work_.factors.data(), chosen, work_.block.data(), work_.grad_row.data());
      if (!request_.grad_items) continue;
      float* target = request_.grad_items + (row + i) * request_.items.columns;
      for (int64_t e = 0; e < request_.items.columns; ++e) target[e] += work_.grad_row[e];
    }
  }

  // The queries that the tile's row i has a part in, and d loss / d (their product with the row).
  int64_t choose(int i, float scale) {
    int64_t count = 0;
    for (int64_t user = 0; user < group_.users; ++user) {
      if (!(work_.lanes[user] >> i & 1)) continue;
      const float share = work_.shares[user * kLanes + i] * scale;
      const int64_t first = group_.packed.start[user], last = group_.packed.start[user + 1];
      if (log_sum_exp_) {
        for (int64_t q = first; q < last; ++q) {
          const float factor = share * work_.weights[q * kLanes + i];
          if (factor == 0) continue;  // also where the query is not finite
          work_.chosen[count] = static_cast<int32_t>(q);
          work_.factors[count++] = factor;
        }
      } else {
        work_.chosen[count] = static_cast<int32_t>(first) + work_.winners[user * kLanes + i];
        work_.factors[count++] = share;
      }
    }
    return count;
  }

  const PartitionGradientRequest& request_;
  Group& group_;
  const Kernels& kernels_;
  GradientWork& work_;
  Share& share_;
  const bool log_sum_exp_;
};

// Gradients of packed queries handed on to the queries that they were made of.
void unpack(const PartitionGradientRequest& request, const Group& group, const AlignedVector<double>& grad_packed) {
  const QueriesView& given = request.queries;
  const bool adds = request.reduce == Reduce::kSum || request.reduce == Reduce::kMean;
  for (int64_t user = 0; user < group.users; ++user) {
    const int64_t whole = group.first_user + user;
    int64_t existing = 0;
    for (int64_t m = 0; m < given.queries; ++m) existing += !given.exists || given.exists[whole * given.queries + m];
    int64_t packed = group.packed.start[user];
    for (int64_t m = 0; m < given.queries; ++m) {
      float* target = request.grad_queries + (whole * given.queries + m) * given.r;
      if (given.exists && !given.exists[whole * given.queries + m]) {
        std::fill(target, target + given.r, 0.0f);
        continue;
      }
      const double* source = grad_packed.data() + packed * group.padded;
      const double divisor = request.reduce == Reduce::kMean ? static_cast<double>(existing) : 1.0;
      for (int64_t e = 0; e < given.r; ++e) target[e] = static_cast<float>(source[e] / divisor);
      if (!adds) ++packed;
    }
  }
}

bool gradient_of_group(const PartitionGradientRequest& request, int64_t first, int64_t last, int64_t padded) {
  Group group(request, first, last, padded);
  const int64_t bytes = std::max<int64_t>(1, group.packed.total * padded * static_cast<int64_t>(sizeof(double)));
  const int64_t most = std::clamp(kShareBytes / bytes, kFewestShares, kMostShares);
  const int64_t n = request.items.rows, rows = round_up((n + most - 1) / most, kBlockRows);
  const int64_t shares = rows ? (n + rows - 1) / rows : 0, threads = std::min<int64_t>(group.threads, shares);
  AlignedVector<double> total(group.packed.total * padded);
  std::fill(total.begin(), total.end(), 0.0);
  if (group.packed.total && n) {
    AlignedVector<Share> sums(shares);
    for (Share& share : sums) share.grad_packed.resize(total.size());
    std::vector<GradientWork> work;
    work.reserve(threads);
    for (int64_t slot = 0; slot < threads; ++slot) work.emplace_back(group);
    std::atomic<int64_t> next{0};
    run_parallel(static_cast<int>(threads), [&](int slot) {
      for (int64_t share; (share = next.fetch_add(1)) < shares && !group.stop.load(std::memory_order_relaxed);) {
        Gradient gradient(request, group, work[slot], sums[share]);
        gradient.run(share * rows, std::min(n, (share + 1) * rows), slot);
      }
    });
    if (group.stop.load()) return false;
    for (const Share& share : sums) {
      for (size_t e = 0; e < total.size(); ++e) total[e] += share.grad_packed[e];
      *request.grad_temperature += share.grad_temperature;
    }
  }
  unpack(request, group, total);
  return true;
}

}  // namespace

bool partition_gradient(const PartitionGradientRequest& request) {
  const DefaultFloatEnvironment environment;
  const int64_t n = request.items.rows, padded = padded_columns(request.queries);
  const int64_t users = users_of_group(request.queries);
  if (request.grad_items) std::fill(request.grad_items, request.grad_items + n * request.items.columns, 0.0f);
  if (request.grad_bias) std::fill(request.grad_bias, request.grad_bias + n, 0.0f);
  *request.grad_temperature = 0;
  for (int64_t first = 0; first < request.queries.users; first += users)
    if (!gradient_of_group(request, first, std::min(request.queries.users, first + users), padded)) return false;
  return true;
}

}  // namespace urm
