// What a scan for the top k keeps: the running best of every user, which threads share, and what each thread has found
// since it last looked there.
#pragma once

#include <atomic>
#include <limits>
#include <mutex>
#include <vector>

#include "group.h"
#include "sampling.h"
#include "topk_buffer.h"

namespace urm {

class TopKResults {
 public:
  TopKResults(const Group& group, int64_t k, int64_t capacity)
      : group_(group),
        k_(k),
        fresh_limit_(2 * k <= kFresh ? std::max<int64_t>(2 * k, kFewestFresh) : kFresh),
        of_chunk_(group.threads * group.chunks),
        keys_(group.users * capacity),
        fresh_keys_(group.threads * group.users * kFresh),
        best_(group.users),
        fresh_(group.threads * group.users) {
    for (int64_t user = 0; user < group.users; ++user)
      best_[user].buffer = TopKBuffer(keys_.data() + user * capacity, k, capacity);
    for (std::size_t i = 0; i < fresh_.size(); ++i) fresh_[i].keys = fresh_keys_.data() + i * kFresh;
  }

  // Only what reaches this is expected to be of use.
  void raise_floor(int64_t user, uint64_t floor) {
    best_[user].buffer.raise_floor(floor);
    best_[user].floor.store(best_[user].buffer.floor(), std::memory_order_relaxed);
  }

  // When `chunks` have been scanned or begun, in an order that scatters them: thresholds that k rows of the whole table
  // are expected to reach.
  void expect(int slot, int64_t chunks) {
    for (int64_t user = 0; user < group_.users; ++user) {
      const std::lock_guard<std::mutex> lock(best_[user].mutex);
      TopKBuffer& buffer = best_[user].buffer;
      const double share = static_cast<double>(chunks) / static_cast<double>(group_.chunks);
      const int64_t rank = rank_in_part(share * static_cast<double>(k_), together(slot, buffer, chunks));
      if (rank >= std::min(k_, buffer.size())) continue;
      std::nth_element(buffer.keys(), buffer.keys() + (rank - 1), buffer.keys() + buffer.size(),
                       std::greater<uint64_t>());
      raise_floor(user, lowest_key(key_score(buffer.keys()[rank - 1])));
    }
  }

  // What has been found so far raises the floors, also where it is not yet time to cut.
  void settle() {
    for (Best& best : best_) {
      best.buffer.cut();
      best.floor.store(best.buffer.floor(), std::memory_order_relaxed);
    }
  }

  // After the scan: all that is left.
  TopKBuffer& best(int64_t user) { return best_[user].buffer; }

  // Scores below this are of no use.
  float threshold(int slot, int64_t user) { return fresh(slot, user).threshold; }

  // Scores of the lanes of a tile that reach the threshold.
  void take(int slot, int64_t user, int64_t place, uint32_t lanes, const float* scores) {
    for (; lanes; lanes &= lanes - 1) {
      const int i = __builtin_ctz(lanes);
      const int64_t row = group_.row_at(place + i);
      const uint64_t key = pack_key(scores[i], static_cast<uint32_t>(row));
      if (key >= fresh(slot, user).floor && group_.request.filter.allows(group_.first_user + user, row))
        push(slot, user, key);
    }
  }

  // One score of an allowed row, by its number.
  void take_one(int slot, int64_t user, int64_t row, float score) {
    const uint64_t key = pack_key(score, static_cast<uint32_t>(row));
    if (key >= fresh(slot, user).floor) push(slot, user, key);
  }

  void adopt(int slot) {
    for (int64_t user = 0; user < group_.users; ++user) adopt(slot, user);
  }
  void adopt(int slot, int64_t user) { fresh(slot, user).raise(best_[user].floor.load(std::memory_order_relaxed)); }

  void publish(int slot) {
    for (int64_t user = 0; user < group_.users; ++user)
      if (fresh(slot, user).size) merge(slot, user);
  }

 private:
  static constexpr int64_t kFresh = 64;  // keys that a thread keeps to itself
  static constexpr int64_t kFewestFresh = 8;

  struct Fresh {
    uint64_t* keys = nullptr;
    int64_t size = 0;
    uint64_t floor = kNoKey;
    float threshold = -std::numeric_limits<float>::infinity();

    void raise(uint64_t above) {
      if (above <= floor) return;
      floor = above;
      threshold = key_score(above);
    }
  };

  struct Best {
    std::mutex mutex;
    TopKBuffer buffer;
    std::atomic<uint64_t> floor{kNoKey};
  };

  // The variance of the number of a chunk's rows in the buffer over its mean: 1 where rows come independently.
  double together(int slot, TopKBuffer& buffer, int64_t chunks) {
    int32_t* of_chunk = of_chunk_.data() + slot * group_.chunks;
    std::fill(of_chunk, of_chunk + group_.chunks, 0);
    for (int64_t i = 0; i < buffer.size(); ++i)
      ++of_chunk[group_.place_of(key_row(buffer.keys()[i])) / group_.chunk_rows];
    double squares = 0;
    for (int64_t chunk = 0; chunk < group_.chunks; ++chunk)
      squares += static_cast<double>(of_chunk[chunk]) * of_chunk[chunk];
    const double mean = static_cast<double>(buffer.size()) / static_cast<double>(chunks);
    return mean > 0 ? std::max(1.0, squares / static_cast<double>(chunks) / mean - mean) : 1.0;
  }

  Fresh& fresh(int slot, int64_t user) { return fresh_[slot * group_.users + user]; }

  void push(int slot, int64_t user, uint64_t key) {
    Fresh& fresh = this->fresh(slot, user);
    fresh.keys[fresh.size++] = key;
    if (fresh.size < fresh_limit_) return;
    if (fresh_limit_ < kFresh) cut(fresh);
    else merge(slot, user);
  }

  // Of few results, a thread's own k best are a floor for it, long before all that it would hand over are found.
  void cut(Fresh& fresh) {
    std::nth_element(fresh.keys, fresh.keys + (k_ - 1), fresh.keys + fresh.size, std::greater<uint64_t>());
    fresh.size = k_;
    fresh.raise(fresh.keys[k_ - 1]);
  }

  void merge(int slot, int64_t user) {
    Fresh& fresh = this->fresh(slot, user);
    Best& best = best_[user];
    const std::lock_guard<std::mutex> lock(best.mutex);
    for (int64_t i = 0; i < fresh.size; ++i) best.buffer.push(fresh.keys[i]);
    fresh.size = 0;
    fresh.raise(best.buffer.floor());
    best.floor.store(best.buffer.floor(), std::memory_order_relaxed);
  }

  const Group& group_;
  const int64_t k_, fresh_limit_;
  AlignedVector<int32_t> of_chunk_;  // [threads, chunks]
  AlignedVector<uint64_t> keys_, fresh_keys_;
  std::vector<Best> best_;      // [users]
  AlignedVector<Fresh> fresh_;  // [threads, users]
};

}  // namespace urm
