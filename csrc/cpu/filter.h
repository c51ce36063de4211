// Which rows a user may be given: a mask (bytes or bits, shared or one a user) and a sorted list of exclusions.
// Asked about survivors of the scan; masks that allow few rows are listed before it (allowed_rows.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace urm {

enum class MaskKind : int { kNone = 0, kBytes = 1, kBits = 2 };

struct Filter {
  MaskKind kind = MaskKind::kNone;
  const uint8_t* mask = nullptr;
  int64_t mask_user_stride = 0;
  int64_t mask_row_stride = 1;       // bytes only; bits are packed, lowest first
  const int64_t* exclude = nullptr;  // [users, exclude_count], each ascending
  int64_t exclude_count = 0;
  const uint8_t* alive = nullptr;  // bits of rows that have not been removed, lowest first; null: all
  int64_t row_step = 1;            // rows are asked for by their number in units of this

  // The same for users from `first` on and every `step`-th row.
  Filter sampled(int64_t first, int64_t step) const {
    Filter sample = *this;
    sample.mask += first * mask_user_stride;
    sample.exclude += first * exclude_count;
    sample.row_step *= step;
    return sample;
  }

  bool allows_all() const { return kind == MaskKind::kNone && !alive && !exclude_count; }

  bool allows(int64_t user, int64_t row) const {
    row *= row_step;
    if (alive && !((alive[row >> 3] >> (row & 7)) & 1)) return false;
    if (kind == MaskKind::kBytes) {
      if (!mask[user * mask_user_stride + row * mask_row_stride]) return false;
    } else if (kind == MaskKind::kBits) {
      if (!((mask[user * mask_user_stride + (row >> 3)] >> (row & 7)) & 1)) return false;
    }
    if (!exclude_count) return true;
    const int64_t* first = exclude + user * exclude_count;
    return !std::binary_search(first, first + exclude_count, row);
  }

  // Of `count` <= 64 rows from `row` on, a multiple of 32, the set of those that masks allow; exclusions are not asked.
  uint64_t masked(int64_t user, int64_t row, int64_t count) const {
    uint64_t set = count == 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    if (kind == MaskKind::kBits) set &= bits_of(mask + user * mask_user_stride, row, count);
    if (alive) set &= bits_of(alive, row, count);
    if (kind != MaskKind::kBytes) return set;
    const uint8_t* bytes = mask + user * mask_user_stride + row * mask_row_stride;
    uint64_t some = 0;
    int64_t i = 0;
    for (; mask_row_stride == 1 && i + 16 <= count; i += 16) some |= uint64_t{bits_of_bytes(bytes + i)} << i;
    for (; i < count; ++i) some |= uint64_t{bytes[i * mask_row_stride] != 0} << i;
    return set & some;
  }

  // Those of the given lanes (bit i: row + i) that are allowed.
  uint32_t allowed(int64_t user, int64_t row, uint32_t lanes) const {
    if (alive || kind != MaskKind::kNone) {
      Filter masks = *this;
      masks.exclude_count = 0;
      for (uint32_t left = lanes; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        if (!masks.allows(user, row + i)) lanes &= ~(1u << i);
      }
    }
    if (!exclude_count || !lanes) return lanes;
    const int64_t* first = exclude + user * exclude_count;
    const int64_t* last = first + exclude_count;
    for (const int64_t* e = std::lower_bound(first, last, row * row_step); e != last; ++e) {
      const int64_t lane = *e / row_step - row;
      if (lane > 31) break;
      if (*e % row_step == 0) lanes &= ~(1u << lane);
    }
    return lanes;
  }

 private:
  // Which of sixteen bytes are not zero.
  static uint16_t bits_of_bytes(const uint8_t* bytes) {
#ifdef __SSE2__
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return static_cast<uint16_t>(~_mm_movemask_epi8(_mm_cmpeq_epi8(x, _mm_setzero_si128())));
#else
    uint16_t set = 0;
    for (int i = 0; i < 16; ++i) set |= static_cast<uint16_t>((bytes[i] != 0) << i);
    return set;
#endif
  }

  static uint64_t bits_of(const uint8_t* bits, int64_t row, int64_t count) {
    uint64_t set = 0;
    std::memcpy(&set, bits + row / 8, (count + 7) / 8);
    return set;
  }
};

}  // namespace urm
