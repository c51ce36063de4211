// Rows of bytes into their places, and out of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace urm {

// target row rows[i] = source row i; source rows follow each other.
inline void write_rows(char* target, int64_t stride_bytes, int64_t row_bytes, const int64_t* rows, int64_t count,
                       const char* source) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(target + rows[i] * stride_bytes, source + i * row_bytes, row_bytes);
}

// The way back: target row i = source row rows[i].
inline void read_rows(char* target, int64_t row_bytes, const int64_t* rows, int64_t count, const char* source,
                      int64_t stride_bytes) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(target + i * row_bytes, source + rows[i] * stride_bytes, row_bytes);
}

}  // namespace urm
