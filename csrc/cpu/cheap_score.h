// A cheap score: dots of a panel of rows in whatever order and precision is fastest, and how far they can be from the
// canonical dot. Rows whose cheap score plus slack stays below a user's threshold are never scored exactly.
//
// Slack is error * |row| * |query|, an inequality and not an estimate (docs/design.md has the proof). It holds for
// rows whose length is finite and queries no longer than kLongestQuery; the scan scores everything else exactly.
#pragma once

#include <cstdint>

#include "views.h"

namespace urm {

constexpr float kLongestQuery = 0x1p60f;   // rows are shorter than 2^64, as their squares are finite: no sum overflows
constexpr float kLeastLength = 0x1p-50f;   // added to lengths: covers what underflows or is flushed to zero
constexpr int64_t kWidestCheapRow = 8192;  // up to here the terms of `sum_error` beyond the first order are covered

// fp32 roundings of a sum of r products in any order, of the canonical dot, of lengths and of the bound itself, with
// room.
static inline float sum_error(int64_t r) {
  return static_cast<float>(3 * r + 64) * 0x1p-24f;
}

struct CheapScore {
  int panel_rows;          // a multiple of 16
  int element_bytes;       // of panels and packed queries
  int width_multiple;      // rows are padded to this many elements,
  int query_multiple;      // the number of queries to this
  int64_t fewest_queries;  // of a group, from which on it beats the exact kernels
  bool takes_bfloat16;     // `stage` also reads bfloat16 rows, of whole widths, as they lie

  float (*error)(DType items, int64_t r);

  // Queries [count, padded] as `dots` wants them for rows that were staged from `rows`, float32 or bfloat16.
  void (*pack_queries)(const float* queries, int64_t count, int64_t padded, DType rows, void* out);

  // 16 rows, of `padded` floats each or of bfloat16 elements, into columns [column, column + 16) of a panel; lengths[i]
  // is not below the length of row i, and not finite where the row is not. Fetches `ahead` on the way.
  void (*stage)(const void* rows, DType dtype, int64_t stride_bytes, int64_t padded, int column, Ahead ahead,
                void* panel, float* lengths);

  // out[q * panel_rows + i] = cheap dot of row i and query q, for `count` rounded up to query_multiple.
  void (*dots)(const void* panel, const void* queries, int64_t count, int64_t padded, float* out);

  // Around a thread's calls of `dots`; null where the processor needs no preparation.
  void (*enter)();
  void (*leave)();
};

static inline int64_t cheap_bytes(const CheapScore& cheap, int64_t vectors, int64_t padded) {
  return vectors * round_up(padded, cheap.width_multiple) * cheap.element_bytes;
}

}  // namespace urm
