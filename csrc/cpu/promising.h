// A threshold before the scan: codes of some rows that are likely to be among the best, and then exact scores of those
// with the largest bounds.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "code_scanner.h"
#include "float_environment.h"
#include "thread_pool.h"
#include "topk_results.h"

namespace urm {

constexpr double kPassCost = 4;   // of sums of codes that lie apart
constexpr double kPairCost = 64;  // of scoring a pair by itself, in sums of its codes

// Of sums for so many rows.
inline double multiply_adds(const Group& group, int64_t rows) {
  return static_cast<double>(rows) * static_cast<double>(group.padded * group.packed.total);
}

// So many tasks of each user, task(user, i, scanner), a few at a time dealt to threads, each with a scanner of its own.
template <class Task>
void each_task(Group& group, int threads, std::vector<Workspace>& work, TopKResults& results, int64_t of_user,
               Task task) {
  constexpr int64_t kAtOnce = 8;
  const int64_t tasks = group.users * of_user;
  std::atomic<int64_t> next{0};
  run_parallel(static_cast<int>(std::clamp<int64_t>(tasks / kAtOnce, 1, threads)), [&](int slot) {
    const DefaultFloatEnvironment environment;
    CodeScanner<TopKResults> scanner(group, work[slot], results, slot);
    for (int64_t begin; (begin = next.fetch_add(kAtOnce, std::memory_order_relaxed)) < tasks;)
      for (int64_t i = begin; i < std::min(tasks, begin + kAtOnce); ++i) {
        results.adopt(slot, i / of_user);
        task(i / of_user, i % of_user, scanner);
      }
    scanner.finish();
    results.publish(slot);
    group.count(scanner.counts());
  });
  results.settle();
}

// Of each user, exact scores of a few more than k rows: those with the largest bounds that take(user, i, scanner) has
// taken (CodeScanner::take_bounds) in its tasks.
template <class Take>
void score_most_promising(Group& group, std::vector<Workspace>& work, int64_t k, int threads, int64_t of_user,
                          TopKResults& found, Take take) {
  const int64_t rows = k + k / 2 + 16;
  TopKResults promising(group, rows, 2 * rows);  // twice the room: cut back less often
  each_task(group, threads, work, promising, of_user, take);
  const int scorers = group.threads_for(kPairCost * multiply_adds(group, rows));
  each_task(group, scorers, work, found, rows, [&](int64_t user, int64_t i, CodeScanner<TopKResults>& scanner) {
    TopKBuffer& best = promising.best(user);
    if (i >= best.size()) return;
    const uint64_t key = best.keys()[i];
    scanner.keep({key_row(key), user, key_score(key), ~uint64_t{0}});
  });
}

// Where masks leave few blocks: floors of `results` that k of their rows reach.
void use_few_blocks(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results);

}  // namespace urm
