// A cheap score: dots of a panel of rows in whatever order and precision is fastest, and how far they can be from the
// canonical dot. Rows whose cheap score plus slack stays below a user's threshold are never scored exactly:
//
//   dot[q, i] <= scale[i] * (cheap[q, i] + slack[q] * length[i])
//
// an inequality, not an estimate (docs/design.md has the proof). It holds for rows with a finite length and queries no
// longer than kLongestQuery; the scan scores everything else exactly.
#pragma once

#include <cstdint>

#include "views.h"

namespace urm {

constexpr float kLongestQuery =
    0x1p60f;  // with rows that are shorter than 2^64 (1 + a rounding), as their squares are finite, no sum overflows
constexpr float kLeastLength = 0x1p-50f;   // added to lengths: covers what underflows or is flushed to zero
constexpr int64_t kWidestCheapRow = 8192;  // up to here the terms of `sum_error` beyond the first order are covered

// fp32 roundings of a sum of r products in any order, of the canonical dot, of lengths and of the bound itself, with
// room.
static inline float sum_error(int64_t r) {
  return static_cast<float>(3 * r + 64) * 0x1p-24f;
}

struct CheapScore {
  int panel_rows;         // a multiple of 16
  int query_multiple;     // `dots` writes results for the number of queries rounded up to this
  int bfloat16_multiple;  // bfloat16 rows whose elements are a multiple of this are staged as they lie; 0: none are

  int64_t (*panel_bytes)(int64_t padded);
  int64_t (*query_bytes)(int64_t count, int64_t padded);

  // Queries [count, padded], not longer than `lengths`, as `dots` wants them for rows that are staged from `rows`
  // (float32 or bfloat16); slack [count].
  void (*pack_queries)(const float* queries, const float* lengths, int64_t count, int64_t padded, DType rows, void* out,
                       float* slack);

  // 16 rows, of `padded` floats each or of bfloat16 elements, into columns [column, column + 16) of a panel, with the
  // rows' scales and lengths; a length is not finite where its row is not. Fetches `ahead` on the way.
  void (*stage)(const void* rows, DType dtype, int64_t stride_bytes, int64_t padded, int column, Ahead ahead,
                void* panel, float* scales, float* lengths);

  // out[q * panel_rows + i] = cheap[q, i].
  void (*dots)(const void* panel, const void* queries, int64_t count, int64_t padded, float* out);

  // Around a thread's calls of `dots`; null where the processor needs no preparation.
  void (*enter)();
  void (*leave)();
};

}  // namespace urm
