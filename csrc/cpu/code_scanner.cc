#include "code_scanner.h"

#include <algorithm>

#include "allowed_blocks.h"
#include "partition_results.h"
#include "rescore.h"
#include "topk_results.h"

namespace urm {
namespace {

bool is_among(uint64_t groups, int64_t g) {
  return groups >> std::min<int64_t>(g, 63) & 1;
}

}  // namespace

template <class Results>
int64_t CodeScanner<Results>::scan(int64_t first_block, int64_t blocks) {
  const int64_t next = first_block + blocks;
  if (request_.blocks) {
    const auto [first, run] = request_.blocks->next_run(next, kStretchBlocks);
    return scan_users(first_block, blocks, nullptr, memory_of(first, run));
  }
  // Blocks of a sample lie apart; the processor does not foresee them, but there are few.
  const int64_t more = step_ == 1 ? std::min<int64_t>(kStretchBlocks, codes_.count - next) : 0;
  return scan_users(first_block, blocks, nullptr, memory_of(next, more));
}

template <class Results>
int64_t CodeScanner<Results>::scan_wanted(int64_t first_block, int64_t blocks, const uint32_t* wanted, Ahead ahead) {
  return scan_users(first_block, blocks, wanted, ahead);
}

// Blocks without a row that a user may be given are not read for it.
template <class Results>
int64_t CodeScanner<Results>::scan_users(int64_t first_block, int64_t blocks, const uint32_t* wanted, Ahead ahead) {
  const float* bias = request_.bias.data ? bias_of_blocks(first_block, blocks) : nullptr;
  int64_t survived = 0;
  uint32_t read = 0;
  for (int64_t user = 0; user < group_.users; ++user) {
    if (group_.packed.start[user + 1] == group_.packed.start[user]) continue;
    uint32_t some = wanted ? wanted[user] : (1u << blocks) - 1;
    if (some) some &= group_.allowed_blocks(user, first_block * step_, step_, blocks);
    if (!some) continue;
    // Where some blocks are left out, the next ones will be.
    if (!wanted && !request_.blocks && __builtin_popcount(some) < blocks) ahead = {nullptr, 0};
    survived += scan_user(user, first_block, some, bias, ahead);
    ahead = {nullptr, 0};
    read |= some;
  }
  counts_.bytes += __builtin_popcount(read) * block_bytes(r_, codes_.bits);
  counts_.survivors += survived;
  rescore(work_.waiting);
  work_.waiting.swap(work_.survivors);
  return survived;
}

template <class Results>
int64_t CodeScanner<Results>::scan_user(int64_t user, int64_t first_block, uint32_t some, const float* bias,
                                        Ahead ahead) {
  int64_t survived = 0;
  while (some) {
    const int from = __builtin_ctz(some), run = __builtin_ctz(~(some >> from));
    some &= ~(((1u << run) - 1) << from);
    const int64_t first = first_block + from;
    sum_blocks(user, first, run, ahead);
    ahead = {nullptr, 0};
    float bounds[kStretchBlocks * kBlockRows];
    uint32_t survivors[kStretchBlocks];
    prune(user, first, run, bias ? bias + from * kBlockRows : nullptr, bounds, survivors);
    for (int64_t b = 0; b < run; ++b)
      for (uint32_t left = survivors[b]; left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        const int64_t i = b * kBlockRows + lane, place = (first + b) * step_ * kBlockRows + lane;
        if (!request_.filter.allows(group_.first_user + user, group_.row_at(place))) continue;
        keep({place, user, bounds[i], groups_that_reach(user, place, i, run * kBlockRows, bounds[i])});
        ++survived;
      }
  }
  return survived;
}

template <class Results>
void CodeScanner<Results>::take_bounds(int64_t user, int64_t first_block, int64_t blocks, Ahead ahead) {
  float bounds[kStretchBlocks * kBlockRows];
  uint32_t survivors[kStretchBlocks];
  const float* bias = request_.bias.data ? bias_of_blocks(first_block, blocks) : nullptr;
  sum_blocks(user, first_block, blocks, ahead);
  prune(user, first_block, blocks, bias, bounds, survivors);
  counts_.bytes += blocks * block_bytes(r_, codes_.bits);
  for (int64_t b = 0; b < blocks; ++b)
    for (uint32_t left = survivors[b]; left; left &= left - 1) {
      const int64_t i = b * kBlockRows + __builtin_ctz(left), place = first_block * kBlockRows + i;
      if (!request_.filter.allows(group_.first_user + user, group_.row_at(place))) continue;
      const float bound = bounds[i] == bounds[i] ? bounds[i] : std::numeric_limits<float>::infinity();
      results_.take_one(slot_, user, place, bound);
    }
}

template <class Results>
Ahead CodeScanner<Results>::memory_of(int64_t first_block, int64_t blocks) const {
  const int64_t bytes = block_bytes(r_, codes_.bits);
  return {codes_.blocks + first_block * bytes, blocks * bytes / kCacheLine};
}

template <class Results>
const float* CodeScanner<Results>::bias_of_blocks(int64_t first_block, int64_t blocks) {
  if (step_ == 1) return bias_of(group_, work_, first_block * kBlockRows, blocks * kBlockRows);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t place = (first_block + b) * step_ * kBlockRows;
    for (int64_t i = 0; i < kBlockRows; ++i) work_.bias[b * kBlockRows + i] = bias_of_row(place + i);
  }
  return work_.bias.data();
}

template <class Results>
void CodeScanner<Results>::sum_blocks(int64_t user, int64_t first_block, int64_t blocks, Ahead ahead) {
  const CodeSums& sums = *kernels_.codes;
  const auto largest = codes_.bits == 2 ? sums.largest2 : codes_.bits == 4 ? sums.largest4 : sums.largest8;
  const int64_t quads = quads_of(r_), at = queries_.first_group[user] * kLanes;
  const int64_t stride = step_ * block_bytes(r_, codes_.bits);
  largest(codes_.blocks + first_block * stride, stride, blocks, quads, queries_.codes.data() + at * quads * kQuad,
          queries_.starts.data() + at, group_.packed.start[user + 1] - group_.packed.start[user], ahead,
          work_.largest_sums.data());
}

// Of blocks whose sums are there, the rows that may reach the user's threshold.
template <class Results>
void CodeScanner<Results>::prune(int64_t user, int64_t first_block, int64_t blocks, const float* bias, float* bounds,
                                 uint32_t* survivors) {
  float relative = 0, offset = 0;
  if (request_.reduce == Reduce::kLogSumExp)
    log_sum_exp_excess(group_.packed.start[user + 1] - group_.packed.start[user], &relative, &offset);
  const int64_t stride = step_ * block_bytes(r_, codes_.bits);
  kernels_.prune_codes(work_.largest_sums.data(), groups_of(user),
                       codes_.blocks + first_block * stride + block_code_bytes(r_, codes_.bits), stride, blocks,
                       queries_.bounds[user], relative, offset, bias,
                       probable() ? group_.least[user] : results_.threshold(slot_, user), bounds, survivors);
}

template <class Results>
void CodeScanner<Results>::bounds_of_block(int64_t user, int64_t block, float* bounds) {
  sum_blocks(user, block, 1, Ahead{nullptr, 0});
  uint32_t survivors;
  prune(user, block, 1, nullptr, bounds, &survivors);
}

template <class Results>
uint32_t CodeScanner<Results>::reach_of_block(int64_t user, int64_t block) {
  float bounds[kBlockRows], bias[kBlockRows];
  uint32_t survivors;
  if (request_.bias.data) kernels_.widen(part_of(request_.bias, block * kBlockRows, kBlockRows), kBlockRows, bias);
  sum_blocks(user, block, 1, Ahead{nullptr, 0});
  prune(user, block, 1, request_.bias.data ? bias : nullptr, bounds, &survivors);
  return survivors;
}

template <class Results>
bool CodeScanner<Results>::admits(int64_t user, int64_t place) {
  return (reach_of_block(user, place / kBlockRows) >> place % kBlockRows & 1) && fine_reaches(user, place);
}

// Whether a row's probable bound from its fine code, where there is one, reaches what it has to.
template <class Results>
bool CodeScanner<Results>::fine_reaches(int64_t user, int64_t place) {
  if (!codes_.fine) return true;
  float* bounds = work_.row_bounds.data();
  bounds_of_row(user, place, ~uint64_t{0}, bounds, true);
  return !(bound_of_score(user, bounds, bias_of_row(place)) < group_.least[user]);
}

// The bound of a row's score from those of all of the user's queries.
template <class Results>
float CodeScanner<Results>::bound_of_score(int64_t user, const float* bounds, float bias) const {
  const int64_t queries = group_.packed.start[user + 1] - group_.packed.start[user];
  const float largest = *std::max_element(bounds, bounds + queries);
  if (request_.reduce != Reduce::kLogSumExp) return largest + bias;
  float relative, offset;
  log_sum_exp_excess(queries, &relative, &offset);
  return fused_multiply_add(std::fabs(largest), relative, largest) + offset + bias;
}

template <class Results>
void CodeScanner<Results>::finish() {
  rescore(work_.waiting);
  rescore(work_.survivors);
}

// Of a survivor, the groups of queries whose own largest sum still reaches the threshold. The bound stands for the
// largest of all; scale * step * (difference of sums) lower is a bound for a group. 10^-6 covers these roundings many
// times over.
template <class Results>
uint64_t CodeScanner<Results>::groups_that_reach(int64_t user, int64_t place, int64_t i, int64_t rows,
                                                 float bound) const {
  const int64_t groups = groups_of(user);
  // A probable bound says which rows to score, not which queries make their scores.
  if (groups == 1 || probable() || request_.reduce == Reduce::kLogSumExp) return ~uint64_t{0};
  const int32_t* sums = work_.largest_sums.data() + i;
  int64_t largest = sums[0];
  for (int64_t g = 1; g < groups; ++g) largest = std::max<int64_t>(largest, sums[g * rows]);
  constexpr double kRoom = 1e-6;
  const double threshold = results_.threshold(slot_, user);
  const float scale = side_of_row(block_of(place), block_code_bytes(r_, codes_.bits), place % kBlockRows).scale;
  const double unit = static_cast<double>(scale) * queries_.bounds[user].step * (1 - kRoom);
  const double room = bound - threshold + kRoom * (std::fabs(bound) + std::fabs(threshold));
  uint64_t reach = 0;
  for (int64_t g = 0; g < groups; ++g)
    if (!(unit * static_cast<double>(largest - sums[g * rows]) > room))
      reach |= uint64_t{1} << std::min<int64_t>(g, 63);
  return reach;
}

template <class Results>
void CodeScanner<Results>::keep(const Survivor& survivor) {
  if (work_.survivors.size() == kSurvivors) {
    rescore(work_.waiting);
    rescore(work_.survivors);
  }
  work_.survivors.push_back(survivor);
  if (codes_.fine)
    fetch(codes_.fine + survivor.place * fine_row_bytes(r_, codes_.bits), fine_row_bytes(r_, codes_.bits));
  else if (group_.packed.total == group_.users) fetch_row(survivor.place);
}

// Scores pairs, and forgets them. Certain bounds are compared again: thresholds may have risen.
template <class Results>
void CodeScanner<Results>::rescore(AlignedVector<Survivor>& pairs) {
  const int64_t most = static_cast<int64_t>(work_.chosen.size()) / kRescoreBatch;
  Chosen batch[kRescoreBatch];
  for (std::size_t next = 0; next < pairs.size();) {
    int64_t taken = 0;
    for (; next < pairs.size() && taken < kRescoreBatch; ++next) {
      const Survivor& pair = pairs[next];
      if (!probable() && pair.bound < results_.threshold(slot_, pair.user)) continue;
      const int64_t count = choose(pair, work_.chosen.data() + taken * most);
      if (!count) continue;
      fetch_row(pair.place);
      batch[taken++] = {pair.place, pair.user, count};
    }
    for (int64_t i = 0; i < taken; ++i) {
      const Chosen& pair = batch[i];
      float score;
      if (exact_score(group_, work_, pair.user, pair.place, work_.chosen.data() + i * most, pair.count,
                      bias_of_row(pair.place), &score))
        results_.take_one(slot_, pair.user, group_.row_at(pair.place), score);
    }
    counts_.scored += taken;
    counts_.bytes += taken * r_ * element_bytes(request_.items.dtype);
  }
  pairs.clear();
}

template <class Results>
int64_t CodeScanner<Results>::groups_of(int64_t user) const {
  return (group_.packed.start[user + 1] - group_.packed.start[user] + kLanes - 1) / kLanes;
}

template <class Results>
void CodeScanner<Results>::bounds_of_row(int64_t user, int64_t place, uint64_t groups, float* bounds, bool likely) {
  const int64_t quads = quads_of(r_), first = queries_.first_group[user];
  const AlignedVector<float>& kept = likely ? queries_.likely_kept : queries_.kept;
  const AlignedVector<float>& lost = likely ? queries_.likely_lost : queries_.lost;
  const CodedRow coded = coded_row(place);
  for (int64_t g = 0; g < groups_of(user); ++g) {
    if (!is_among(groups, g)) continue;
    const int64_t at = (first + g) * kLanes;
    int32_t sums[kLanes];
    kernels_.codes->of_row(coded.codes, quads, queries_.codes.data() + at * quads * kQuad,
                           queries_.row_starts.data() + at, 1, sums);
    kernels_.bounds_of_queries(sums, kept.data() + at, lost.data() + at, coded, queries_.bounds[user],
                               bounds + g * kLanes);
  }
}

// The user's queries whose own bounds of the row reach the threshold: if its score does, its best one is among them.
// All or none under logsumexp.
template <class Results>
int64_t CodeScanner<Results>::choose(const Survivor& pair, int32_t* chosen) {
  const int64_t queries = group_.packed.start[pair.user + 1] - group_.packed.start[pair.user];
  if (probable() && !fine_reaches(pair.user, pair.place)) return 0;
  if (queries == 1 && (probable() || !codes_.fine)) {
    chosen[0] = 0;
    return 1;
  }
  float* bounds = work_.row_bounds.data();
  bounds_of_row(pair.user, pair.place, pair.groups, bounds);
  const float bias = bias_of_row(pair.place), threshold = results_.threshold(slot_, pair.user);
  int64_t count = 0;
  if (request_.reduce != Reduce::kLogSumExp) {
    for (int64_t g = 0; g * kLanes < queries; ++g)
      for (int64_t m = g * kLanes; is_among(pair.groups, g) && m < std::min(queries, (g + 1) * kLanes); ++m)
        if (!(bounds[m] + bias < threshold)) chosen[count++] = static_cast<int32_t>(m);
    return count;
  }
  return bound_of_score(pair.user, bounds, bias) < threshold ? 0 : queries;
}

template <class Results>
CodedRow CodeScanner<Results>::coded_row(int64_t place) {
  const int64_t quads = quads_of(r_);
  if (codes_.fine) {
    const char *fine = codes_.fine + place * fine_row_bytes(r_, codes_.bits),
               *side = fine + fine_code_bytes(r_, codes_.bits);
    counts_.bytes += fine_row_bytes(r_, codes_.bits);
    CodedRow out{reinterpret_cast<const uint8_t*>(fine), 0, 0, 0};
    if (fine_bits(codes_.bits) == 4) {
      for (int64_t q = 0; q < quads; ++q) {
        uint16_t pair;
        std::memcpy(&pair, fine + q * sizeof pair, sizeof pair);
        const uint32_t quad = unpacked_quad(pair);
        std::memcpy(work_.row_codes.data() + q * kQuad, &quad, sizeof quad);
      }
      out.codes = work_.row_codes.data();
    }
    uint16_t lost, norm;
    std::memcpy(&out.scale, side, sizeof out.scale);
    std::memcpy(&lost, side + 4, sizeof lost);
    std::memcpy(&norm, side + 6, sizeof norm);
    out.lost = value_of_half(lost), out.norm = value_of_half(norm);
    return out;
  }
  const char* block = block_of(place);
  const int64_t lane = place % kBlockRows;
  row_of_block(block, lane, r_, codes_.bits, work_.row_codes.data());
  const RowSide side = side_of_row(block, block_code_bytes(r_, codes_.bits), lane);
  return {work_.row_codes.data(), side.scale, value_of_half(side.lost), value_of_half(side.norm)};
}

template <class Results>
const char* CodeScanner<Results>::block_of(int64_t place) const {
  return codes_.blocks + place / kBlockRows * block_bytes(r_, codes_.bits);
}

template <class Results>
float CodeScanner<Results>::bias_of_row(int64_t place) {
  float bias = 0;
  if (request_.bias.data) kernels_.widen(part_of(request_.bias, group_.row_at(place), 1), 1, &bias);
  return bias;
}

template <class Results>
void CodeScanner<Results>::fetch(const char* from, int64_t bytes) const {
  for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(from + byte);
}

template <class Results>
void CodeScanner<Results>::fetch_row(int64_t place) const {
  if (request_.items.column_stride == 1)
    fetch(row_address(request_.items, group_.row_at(place)), r_ * element_bytes(request_.items.dtype));
}

template class CodeScanner<TopKResults>;
template class CodeScanner<PartitionResults>;

}  // namespace urm
