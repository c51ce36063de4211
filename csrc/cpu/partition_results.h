// What a scan for the partition keeps: each thread's sum of exponentials of every user, and the largest exponents that
// threads share.
#pragma once

#include <atomic>

#include "../common/exponential_sum.h"
#include "group.h"

namespace urm {

class PartitionResults {
 public:
  PartitionResults(const Group& group, float temperature)
      : group_(group), temperature_(temperature), sums_(group.threads * group.users), tops_(group.users) {
    for (auto& sum : sums_) sum.window = exponential_window(group.request.items.rows);
    for (auto& top : tops_) top.store(kNoExponent, std::memory_order_relaxed);
  }

  // [threads], apart by the number of users.
  const ExponentialSum* sums_of(int64_t user) const { return sums_.data() + user; }

  // A score of an allowed row, which will be met again: what is certainly below its window need not be scored.
  void expect(int64_t user, float score) {
    const float divided = score / temperature_;
    if (!(__builtin_fabsf(divided) < kHugeScore)) return;
    int32_t exponent;
    uint32_t mantissa;
    split_exponential(divided, &exponent, &mantissa);
    tops_[user].store(exponent, std::memory_order_relaxed);
  }

  float threshold(int slot, int64_t user) {
    // The score that is divided by the temperature is rounded once more, which 2^-20 below covers too.
    const float least = sum(slot, user).least_score() * temperature_;
    return least - __builtin_fabsf(least) * 0x1p-20f;
  }

  void take(int slot, int64_t user, int64_t row, uint32_t lanes, float* scores) {
    lanes = group_.request.filter.allowed(group_.first_user + user, row, lanes);
    if (!lanes) return;
    int32_t exponents[kLanes];
    uint32_t mantissas[kLanes];
    const uint32_t ordinary = group_.request.kernels->exponentials(scores, temperature_, exponents, mantissas);
    ExponentialSum& sum = this->sum(slot, user);
    for (uint32_t left = lanes & ~ordinary; left; left &= left - 1) sum.add_huge(scores[__builtin_ctz(left)]);
    for (lanes &= ordinary; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      sum.add(exponents[i], mantissas[i]);
    }
  }

  void take_one(int slot, int64_t user, int64_t, float score) {
    ExponentialSum& sum = this->sum(slot, user);
    const float divided = score / temperature_;
    if (!(__builtin_fabsf(divided) < kHugeScore)) return sum.add_huge(divided);
    int32_t exponent;
    uint32_t mantissa;
    split_exponential(divided, &exponent, &mantissa);
    sum.add(exponent, mantissa);
  }

  void adopt(int slot) {
    for (int64_t user = 0; user < group_.users; ++user)
      sum(slot, user).raise(tops_[user].load(std::memory_order_relaxed));
  }

  void publish(int slot) {
    for (int64_t user = 0; user < group_.users; ++user) {
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
