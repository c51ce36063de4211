// A set of rows that only grows: open addressing, at most half full.
#pragma once

#include <cstdint>

#include "aligned.h"

namespace urm {

class RowSet {
 public:
  // Room for so many rows more. Throws std::bad_alloc.
  void reserve_more(int64_t more) {
    const int64_t count = size_ + more;
    if (2 * count <= static_cast<int64_t>(slots_.size())) return;
    int bits = 6;
    while (int64_t{1} << bits < 2 * count) ++bits;
    AlignedVector<uint32_t> before(std::size_t{1} << bits, kEmpty);
    before.swap(slots_);
    shift_ = 32 - bits;
    size_ = 0;
    for (uint32_t row : before)
      if (row != kEmpty) insert(row);
  }

  // Whether it was not there yet.
  bool insert(uint32_t row) {
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t at = slot_of(row);; at = (at + 1) & mask) {
      if (slots_[at] == row) return false;
      if (slots_[at] == kEmpty) return slots_[at] = row, ++size_, true;
    }
  }

 private:
  static constexpr uint32_t kEmpty = 0xFFFFFFFFu;  // rows are below

  // Fibonacci hashing; a table above 2^32 slots starts in its first ones.
  std::size_t slot_of(uint32_t row) const {
    const uint32_t mixed = row * 0x9E3779B1u;
    return shift_ > 0 ? mixed >> shift_ : mixed;
  }

  AlignedVector<uint32_t> slots_;
  int64_t size_ = 0;
  int shift_ = 0;
};

}  // namespace urm
