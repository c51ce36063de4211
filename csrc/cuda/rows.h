// Rows, their columns, and who may be given them.
#pragma once

#include "../common/codes.h"
#include "warp.h"

namespace urm {

__device__ inline float widen_half(uint16_t half) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
  return x;
#endif
  const float magnitude = value_of_half(half & 0x7FFF);
  return half & 0x8000 ? -magnitude : magnitude;
}

// e4m3fn: the bits of its magnitude, seven places up, are a half's with 2^-8 of the value.
__device__ inline float widen_float8(uint8_t x) {
  const uint16_t magnitude = x & 0x7F;
  const float value =
      magnitude == 0x7F ? float_of_bits(0x7FC00000u) : value_of_half(static_cast<uint16_t>(magnitude << 7)) * 256.0f;
  return x & 0x80 ? -value : value;
}

__device__ inline int64_t bytes_of(int64_t type) {
  return type == kFloat32 ? 4 : type == kFloat8 ? 1 : 2;
}

// Element `at`, exactly.
__device__ inline float widen(const void* data, int64_t type, int64_t at) {
  if (type == kFloat32) return __ldg(static_cast<const float*>(data) + at);
  if (type == kFloat8) return widen_float8(__ldg(static_cast<const uint8_t*>(data) + at));
  const uint16_t half = __ldg(static_cast<const uint16_t*>(data) + at);
  return type == kBFloat16 ? float_of_bits(static_cast<uint32_t>(half) << 16) : widen_half(half);
}

__device__ inline float element_of(const Table& table, int64_t row, int64_t e) {
  return widen(table.items, table.type, row * table.row_stride + e * table.column_stride);
}

// Of a column that is there.
__device__ inline float value_of(const Column& column, int64_t row) {
  return widen(column.data, column.type, row * column.stride);
}

// The row whose codes lie at a place, and the place of a row's codes. An order from a file may be none: what it says is
// then wrong, and lies within the table all the same.
__device__ inline int64_t row_at(const Codes& codes, int64_t place) {
  if (!codes.order) return place;
  const uint32_t row = __ldg(&codes.order[place].row);
  return row < codes.count * kBlockRows ? row : place;
}

__device__ inline int64_t place_of(const Codes& codes, int64_t row) {
  if (!codes.order) return row;
  const uint32_t place = __ldg(&codes.order[row].place);
  return place < codes.count * kBlockRows ? place : row;
}

__device__ inline bool bit_of(const uint8_t* bits, int64_t at) {
  return bits[at >> 3] >> (at & 7) & 1;
}

__device__ inline bool is_allowed(const Filter& filter, int64_t user, int64_t row) {
  if (filter.alive && !bit_of(filter.alive, row)) return false;
  const uint8_t* mask = filter.mask + user * filter.user_stride;
  if (filter.kind == kBytes && !mask[row * filter.row_stride]) return false;
  if (filter.kind == kBits && !bit_of(mask, row)) return false;
  const int64_t* exclude = filter.exclude + user * filter.exclude_count;
  int64_t first = 0, last = filter.exclude_count;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (exclude[middle] < row) first = middle + 1;
    else last = middle;
  }
  return !(first < filter.exclude_count && exclude[first] == row);
}

}  // namespace urm
