// What a scan for the partition keeps: each thread's sum of exponentials of every user, and the largest exponents
// that threads share.
#pragma once

#include <atomic>

#include "../common/exponential_sum.h"
#include "group.h"

namespace urm {

class PartitionResults {
 public:
  PartitionResults(const Group& group, float temperature)
      : group_(group), temperature_(temperature), sums_(group.threads * group.users), tops_(group.users) {
    for (auto& sum : sums_) sum.depth = depth_of_groups(group.request.items.rows);
    for (auto& top : tops_) top.store(kNoGroup, std::memory_order_relaxed);
  }

  // [threads], apart by the number of users.
  const ExponentialSum* sums_of(int64_t user) const { return sums_.data() + user; }

  // A score of an allowed row, which will be met again: what certainly does not count beside it need not be scored.
  void expect_score(int64_t user, float score) {
    ExponentialSum alone;
    alone.add(score / temperature_);
    tops_[user].store(alone.top, std::memory_order_relaxed);
  }

  float threshold(int slot, int64_t user) {
    // The score that is divided by the temperature is rounded once more, which 2^-20 below covers too.
    const float least = sum(slot, user).least_score() * temperature_;
    return least - __builtin_fabsf(least) * 0x1p-20f;
  }

  void take(int slot, int64_t user, int64_t place, uint32_t lanes, const float* scores) {
    lanes = group_.allowed(user, place, lanes);
    if (lanes) group_.request.kernels->add_exponentials(scores, lanes, temperature_, &sum(slot, user));
  }

  void take_one(int slot, int64_t user, int64_t, float score) { sum(slot, user).add(score / temperature_); }

  // Thresholds here are certain, and nothing is to be gained by a guess.
  void expect(int, int64_t) {}

  void adopt(int slot) {
    for (int64_t user = 0; user < group_.users; ++user)
      sum(slot, user).raise(tops_[user].load(std::memory_order_relaxed));
  }

  void publish(int slot) {
    for (int64_t user = 0; user < group_.users; ++user) {
      sum(slot, user).empty_lanes();
      const int32_t top = sum(slot, user).top;
      int32_t seen = tops_[user].load(std::memory_order_relaxed);
      while (seen < top && !tops_[user].compare_exchange_weak(seen, top, std::memory_order_relaxed)) {
      }
    }
  }

 private:
  ExponentialSum& sum(int slot, int64_t user) { return sums_[slot * group_.users + user]; }

  const Group& group_;
  const float temperature_;
  AlignedVector<ExponentialSum> sums_;  // [threads, users]
  AlignedVector<std::atomic<int32_t>> tops_;
};

}  // namespace urm
