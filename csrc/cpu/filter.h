// Which rows a user may be given: a mask (bytes or bits, shared or one a user) and a sorted list of exclusions.
// Asked only about survivors of the scan.
#pragma once

#include <algorithm>
#include <cstdint>

namespace urm {

enum class MaskKind : int { kNone = 0, kBytes = 1, kBits = 2 };

struct Filter {
  MaskKind kind = MaskKind::kNone;
  const uint8_t* mask = nullptr;
  int64_t mask_user_stride = 0;
  int64_t mask_row_stride = 1;       // bytes only; bits are packed, lowest first
  const int64_t* exclude = nullptr;  // [users, exclude_count], each ascending
  int64_t exclude_count = 0;
  int64_t row_step = 1;  // rows are asked for by their number in units of this

  // The same for users from `first` on and every `step`-th row.
  Filter sampled(int64_t first, int64_t step) const {
    Filter sample = *this;
    sample.mask += first * mask_user_stride;
    sample.exclude += first * exclude_count;
    sample.row_step *= step;
    return sample;
  }

  bool allows(int64_t user, int64_t row) const {
    row *= row_step;
    if (kind == MaskKind::kBytes) {
      if (!mask[user * mask_user_stride + row * mask_row_stride]) return false;
    } else if (kind == MaskKind::kBits) {
      if (!((mask[user * mask_user_stride + (row >> 3)] >> (row & 7)) & 1)) return false;
    }
    if (!exclude_count) return true;
    const int64_t* first = exclude + user * exclude_count;
    return !std::binary_search(first, first + exclude_count, row);
  }
};

}  // namespace urm
