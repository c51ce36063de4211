// Plain views of what the caller hands over: pointers, sizes and strides (in elements), no framework types.
#pragma once

#include <cstdint>

namespace urm {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Internal linkage throughout: these are compiled into files for different instruction sets.
static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
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
