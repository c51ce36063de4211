#include "guess.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <utility>

#include "code_scanner.h"
#include "float_environment.h"
#include "sampling.h"
#include "thread_pool.h"
#include "topk_results.h"

namespace urm {
namespace {

constexpr int64_t kStep = 256;                  // of the sample: its exact scores cost 0.4 % of an exact scan
constexpr int64_t kFewestRows = 1 << 16;        // a sample of 256
constexpr int64_t kFewestResults = 512;         // below, the running threshold is soon as good as a guess from two rows
constexpr int64_t kBlockStep = 64;              // of a sample of blocks: their codes are 1.6 % of all
constexpr int64_t kFirstRows = 512;             // scored before, without codes, for a threshold of that sample
constexpr int64_t kFirstRowsOfProbable = 1024;  // likewise for probable bounds, which see no better one meanwhile
constexpr int64_t kTriedBlocks = 32;            // on which probable bounds are tried
constexpr int64_t kFewestElements = 1 << 22;    // of a table; smaller ones are read before that has paid
constexpr double kRowLeft = 1024;               // what a row that is left costs, in elements scored in passing
constexpr double kMostTogether = 4;  // rows of a block on average among the best; more, and there is no guess

// The exact score at `rank` among every step-th row.
AlignedVector<float> score_at_rank(const ScanRequest& request, int64_t first, int64_t last, int64_t step,
                                   int64_t rank) {
  const int64_t users = last - first;
  AlignedVector<float> scores(users * rank);
  AlignedVector<int64_t> ids(users * rank);
  TopKRequest sample;
  static_cast<ScanRequest&>(sample) = sampled(request, first, last, step);
  sample.k = rank;
  sample.scores = scores.data();
  sample.ids = ids.data();
  scan_topk(sample);
  AlignedVector<float> found(users);
  for (int64_t user = 0; user < users; ++user) found[user] = scores[(user + 1) * rank - 1];
  return found;
}

// Whether a row of the block has been: its codes may be changing.
bool is_replaced(const Group& group, int64_t block) {
  return group.next_replaced(block * kBlockRows) < (block + 1) * kBlockRows;
}

// Of the rows found, how many there are in a block on average.
double rows_together(const Group& group, const uint64_t* keys, int64_t count) {
  AlignedVector<uint32_t> blocks(count);
  for (int64_t i = 0; i < count; ++i) blocks[i] = static_cast<uint32_t>(group.place_of(key_row(keys[i])) / kBlockRows);
  std::sort(blocks.begin(), blocks.end());
  const auto different = std::unique(blocks.begin(), blocks.end()) - blocks.begin();
  return static_cast<double>(count) / std::max<double>(1, static_cast<double>(different));
}

// From the `most` best rows of a sample of blocks, in which `expected` of the k best are; -inf where these are too few.
float guess_from(const Group& group, TopKBuffer& best, int64_t most, double expected) {
  uint64_t* keys = best.keys();
  const int64_t found = std::min(most, best.size());
  std::partial_sort(keys, keys + found, keys + best.size(), std::greater<uint64_t>());
  const int64_t rank = rank_in_part(expected, rows_together(group, keys, found));
  return rank <= found ? key_score(keys[rank - 1]) : -std::numeric_limits<float>::infinity();
}

// Whether a user's probable bounds leave more than this share of the rows of some blocks.
bool leaves_more_than(CodeScanner<TopKResults>& scanner, const Codes& codes, int64_t user, double share) {
  int64_t left = 0;
  for (int64_t i = 0; i < kTriedBlocks; ++i)
    left += __builtin_popcount(scanner.reach_of_block(user, i * codes.count / kTriedBlocks));
  return static_cast<double>(left) > share * static_cast<double>(kTriedBlocks * kBlockRows);
}

}  // namespace

AlignedVector<float> guess_thresholds(const TopKRequest& request, int64_t first, int64_t last) {
  if (request.items.rows < kFewestRows || request.k < kFewestResults || request.k > request.items.rows / 2) return {};
  const double expected = static_cast<double>(request.k) / kStep;
  return score_at_rank(request, first, last, kStep, rank_in_part(expected, 1));
}

AlignedVector<float> guess_by_codes(const TopKRequest& request, Group& group, std::vector<Workspace>& work) {
  const int64_t blocks = request.codes.count / kBlockStep;
  if (request.items.rows < kFewestRows || !request.k || request.k > request.items.rows / 2) return {};
  const double expected = static_cast<double>(request.k) * (blocks * kBlockRows) / request.items.rows;
  const int64_t most = rank_in_part(expected, kMostTogether);
  TopKResults results(group, most, topk_buffer_capacity(most, request.items.rows));
  const int64_t last_user = group.first_user + group.users, step = std::max(kStep, request.items.rows / kFirstRows);
  const double share = static_cast<double>(most) / static_cast<double>(blocks * kBlockRows);
  const int64_t first_rank = rank_in_part(share * static_cast<double>(request.items.rows / step), 1);
  const AlignedVector<float> first = score_at_rank(request, group.first_user, last_user, step, first_rank);
  for (int64_t user = 0; user < group.users; ++user)
    if (first[user] > -std::numeric_limits<float>::infinity()) results.raise_floor(user, lowest_key(first[user]));
  std::atomic<int64_t> next{0};
  std::atomic<bool> hopeless{false};
  run_parallel(group.threads, [&](int slot) {
    const DefaultFloatEnvironment environment;
    CodeScanner<TopKResults> scanner(group, work[slot], results, slot, kBlockStep);
    for (int64_t block; (block = next.fetch_add(kStretchBlocks, std::memory_order_relaxed)) < blocks;) {
      if (hopeless.load(std::memory_order_relaxed)) break;
      results.adopt(slot);
      for (int64_t end = std::min(blocks, block + kStretchBlocks), run; block < end;
           block += std::max<int64_t>(1, run)) {
        for (run = 0; block + run < end && !is_replaced(group, (block + run) * kBlockStep); ++run) {
        }
        if (!run) continue;
        const int64_t pairs = run * kBlockRows * group.users, survived = scanner.scan(block, run);
        if (survived > pairs / 2) hopeless.store(true, std::memory_order_relaxed);
      }
      results.publish(slot);
    }
    scanner.finish();
    results.publish(slot);
    group.count(scanner.counts());
  });
  // Codes rule out too little: a pair by itself costs as much as several in passing.
  if (hopeless.load()) return guess_thresholds(request, group.first_user, last_user);
  AlignedVector<float> guesses(group.users);
  for (int64_t user = 0; user < group.users; ++user)
    guesses[user] = guess_from(group, results.best(user), most, expected);
  return guesses;
}

bool guess_for_probable_bounds(const TopKRequest& request, Group& group, std::vector<Workspace>& work,
                               AlignedVector<float>& guesses) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t blocks = request.codes.count / kBlockStep, rows = request.items.rows;
  if (rows < kFewestRows || rows * request.items.columns < kFewestElements || request.k > rows / 2) return false;
  const double most_left = std::min(static_cast<double>(request.items.columns) / kRowLeft, 0.125);
  const double expected = static_cast<double>(request.k) * (blocks * kBlockRows) / rows;
  const int64_t most = rank_in_part(expected, kMostTogether), step = rows / kFirstRowsOfProbable;
  const double share = static_cast<double>(most) / static_cast<double>(blocks * kBlockRows);
  const int64_t rank = rank_in_part(share * static_cast<double>(rows / step), 1);
  group.least = score_at_rank(request, group.first_user, group.first_user + group.users, step, rank);

  TopKResults results(group, most, topk_buffer_capacity(most, rows));
  CodeScanner<TopKResults> trial(group, work[0], results, 0);
  const auto has_queries = [&](int64_t user) { return group.packed.start[user + 1] > group.packed.start[user]; };
  for (int64_t user = 0; user < group.users; ++user) {
    if (!has_queries(user)) continue;
    if (group.least[user] == -kInfinity) return false;
    if (leaves_more_than(trial, request.codes, user, std::min(4 * most_left, 0.25))) return false;
    results.raise_floor(user, lowest_key(group.least[user]));
  }
  std::atomic<int64_t> next{0};
  run_parallel(group.threads, [&](int slot) {
    const DefaultFloatEnvironment environment;
    CodeScanner<TopKResults> scanner(group, work[slot], results, slot, kBlockStep);
    for (int64_t block; (block = next.fetch_add(kStretchBlocks, std::memory_order_relaxed)) < blocks;) {
      results.adopt(slot);
      scanner.scan(block, std::min(kStretchBlocks, blocks - block));
      results.publish(slot);
    }
    scanner.finish();
    results.publish(slot);
    group.count(scanner.counts());
  });
  for (int64_t user = 0; user < group.users; ++user)
    if (has_queries(user)) group.least[user] = guess_from(group, results.best(user), most, expected);
  for (int64_t user = 0; user < group.users; ++user)
    if (has_queries(user) &&
        (group.least[user] == -kInfinity || leaves_more_than(trial, request.codes, user, most_left))) {
      guesses = std::move(group.least);
      return false;
    }
  return true;
}

AlignedVector<float> best_of_sample(const ScanRequest& request, int64_t first, int64_t last) {
  if (request.items.rows < kFewestRows) return {};
  return score_at_rank(request, first, last, kStep, 1);
}

}  // namespace urm
