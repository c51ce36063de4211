// Innermost loops of packed tables: integer sums of products of codes (codes_*.cc, one file an instruction set), and
// what surrounds them (kernels_codes.h).
#pragma once

#include <cstdint>

#include "../common/code_bound.h"
#include "../common/rotation.h"
#include "views.h"

namespace urm {

// 16 rows on their way into a table.
struct EncodedRows {
  uint32_t (*quads)[kLanes];  // [quads of a row][row], bytes code + offset
  float scale[kLanes];
  uint16_t lost[kLanes], norm[kLanes];
};

// A user's side of the bound (csrc/common/codes.h): b, the largest g and f (a share of them where bounds are probable),
// and the table's constants, whose part of the bound stands in the sums' start.
struct CodeBound {
  float step, kept, lost;
  float error;  // code_error (g + f)
  float underflow;
  float lost_reference, norm_reference;
};

// The row's side.
struct CodedRow {
  const uint8_t* codes;  // bytes code + offset
  float scale, lost, norm;
};

// Queries lie in groups of 16, zeros in the gap: [group][quad][query][element of the quad].
struct CodeSums {
  // largest[g][32 b + i] = max over the queries of group g of start[q] + u_q . c for row i of block b of `blocks`, each
  // `stride` bytes behind the other. starts[q] includes - offset * sum(u_q).
  void (*largest2)(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                   const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest);
  void (*largest4)(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                   const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest);
  void (*largest8)(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                   const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest);

  // sums[q] = starts[q] + u_q . (code + offset) of one row, for all queries of the groups.
  void (*of_row)(const uint8_t* row, int64_t quads, const int8_t* queries, const int32_t* starts, int64_t groups,
                 int32_t* sums);

  // Measured ceiling: `steps` rounds of independent multiply-adds of bytes.
  int32_t (*rate_loop)(int64_t steps);
  int64_t rate_loop_operations;  // of one step, a multiply-add counts two
};

}  // namespace urm
