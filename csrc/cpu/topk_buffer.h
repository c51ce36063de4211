// The running k best keys of one user: an unordered buffer, cut back to k when it is full.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>

#include "../common/total_order.h"

namespace urm {

// Room for a cut to pay, without leaving the floor behind for long; no more than can ever arrive.
inline int64_t topk_buffer_capacity(int64_t k, int64_t rows) {
  return std::max<int64_t>(1, std::min(k + std::max<int64_t>(k / 8, 64), rows));
}

class TopKBuffer {
 public:
  TopKBuffer() = default;
  TopKBuffer(uint64_t* keys, int64_t k, int64_t capacity) : keys_(keys), k_(k), capacity_(capacity) {}

  // Scores below this cannot enter; equal ones may, by their row.
  float threshold() const { return threshold_; }

  void push(uint64_t key) {
    if (key < floor_) return;
    if (size_ == capacity_) {
      cut();
      if (key < floor_) return;
    }
    keys_[size_++] = key;
  }

  // Takes over a bound: k rows with keys not below `floor` exist.
  void raise_floor(uint64_t floor) {
    if (floor <= floor_) return;
    floor_ = floor;
    threshold_ = key_score(floor);
  }

  // Keeps the k best; afterwards the worst of them is the floor.
  void cut() {
    if (size_ < k_) return;
    std::nth_element(keys_, keys_ + (k_ - 1), keys_ + size_, std::greater<uint64_t>());
    size_ = k_;
    raise_floor(keys_[k_ - 1]);
  }

  uint64_t floor() const { return floor_; }
  uint64_t* keys() { return keys_; }
  int64_t size() const { return size_; }

 private:
  uint64_t* keys_ = nullptr;
  int64_t k_ = 0;
  int64_t capacity_ = 0;
  int64_t size_ = 0;
  uint64_t floor_ = kNoKey;
  float threshold_ = -std::numeric_limits<float>::infinity();
};

}  // namespace urm
