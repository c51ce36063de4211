// What a scan for the top k keeps: each thread's running best of every user, and the floors that threads share.
#pragma once

#include <atomic>

#include "group.h"
#include "topk_buffer.h"

namespace urm {

class TopKResults {
 public:
  TopKResults(const Group& group, int64_t k, int64_t capacity)
      : group_(group), capacity_(capacity), keys_(group.users * group.threads * capacity), floors_(group.users) {
    for (auto& floor : floors_) floor.store(kNoKey, std::memory_order_relaxed);
    for (int slot = 0; slot < group.threads; ++slot)
      for (int64_t user = 0; user < group.users; ++user)
        buffers_.emplace_back(keys_of(user) + slot * capacity, k, capacity);
  }

  TopKBuffer& buffer(int slot, int64_t user) { return buffers_[slot * group_.users + user]; }
  uint64_t* keys_of(int64_t user) { return keys_.data() + user * group_.threads * capacity_; }

  // Scores below this are of no use.
  float threshold(int slot, int64_t user) { return buffer(slot, user).threshold(); }

  // Scores of the lanes of a tile that reach the threshold.
  void take(int slot, int64_t user, int64_t row, uint32_t lanes, const float* scores) {
    TopKBuffer& buffer = this->buffer(slot, user);
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      const uint64_t key = pack_key(scores[i], static_cast<uint32_t>(row + i));
      if (key >= buffer.floor() && group_.request.filter.allows(group_.first_user + user, row + i)) buffer.push(key);
    }
  }

  // One score of an allowed row.
  void take_one(int slot, int64_t user, int64_t row, float score) {
    TopKBuffer& buffer = this->buffer(slot, user);
    const uint64_t key = pack_key(score, static_cast<uint32_t>(row));
    if (key >= buffer.floor()) buffer.push(key);
  }

  void adopt(int slot) {
    for (int64_t user = 0; user < group_.users; ++user)
      buffer(slot, user).raise_floor(floors_[user].load(std::memory_order_relaxed));
  }

  void publish(int slot) {
    for (int64_t user = 0; user < group_.users; ++user) raise_shared_floor(floors_[user], buffer(slot, user).floor());
  }

 private:
  const Group& group_;
  const int64_t capacity_;
  AlignedVector<uint64_t> keys_;       // [users, threads, capacity]
  AlignedVector<TopKBuffer> buffers_;  // [threads, users]
  AlignedVector<std::atomic<uint64_t>> floors_;
};

}  // namespace urm
