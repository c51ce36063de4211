// Plain views of what the caller hands over: pointers, sizes and strides (in elements), no framework types.
#pragma once

#include <cstdint>

namespace urm {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3 };  // kFloat8: e4m3fn

// Internal linkage throughout: these are compiled into files for different instruction sets.
static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8 ? 1 : 2;
}

// A strided [rows, columns] array; any stride, 0 included.
struct MatrixView {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

static inline const char* row_address(const MatrixView& view, int64_t row) {
  return static_cast<const char*>(view.data) + row * view.row_stride * element_bytes(view.dtype);
}

static inline int64_t row_bytes(const MatrixView& view) {
  return view.columns * element_bytes(view.dtype);
}

// One row.
static inline MatrixView row_view(MatrixView items, int64_t row) {
  items.data = row_address(items, row);
  items.rows = 1;
  return items;
}

// Elements [first, first + count) of a [1, n] view.
static inline MatrixView part_of(MatrixView vector, int64_t first, int64_t count) {
  vector.data = static_cast<const char*>(vector.data) + first * vector.column_stride * element_bytes(vector.dtype);
  vector.columns = count;
  return vector;
}

// Every step-th row.
static inline MatrixView every(MatrixView items, int64_t step) {
  items.rows /= step;
  items.row_stride *= step;
  return items;
}

// Every step-th element of a [1, n] view.
static inline MatrixView every_column(MatrixView vector, int64_t step) {
  vector.columns /= step;
  vector.column_stride *= step;
  return vector;
}

// A half with the value of an e4m3fn number / 2^8: the conversion from half then takes subnormals as they are.
static inline uint16_t half_of_float8(uint8_t x) {
  const uint16_t magnitude = x & 0x7F;
  return static_cast<uint16_t>((x & 0x80) << 8 | (magnitude == 0x7F ? 0x7E00 : magnitude << 7));
}

constexpr float kHalfToFloat8 = 256.0f;

enum class Reduce : int { kMax = 0, kSum = 1, kMean = 2, kLogSumExp = 3 };

constexpr int64_t kCacheLine = 64;

// Cache lines that will be needed soon: fetched a few at a time between the arithmetic, so that neither waits.
struct Ahead {
  const char* address;
  int64_t lines;
};

static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace urm
