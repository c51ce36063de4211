// What kernels are given. A kernel's parameters are integers of 64 bits (addresses among them), floats, and structs of
// such integers, so that every way to launch one (nvcc's runtime, CuPy, tests without a GPU) hands over the same list.
#pragma once

#include "../common/rotation.h"

#if !defined(URM_DYNAMIC_SHARED)  // tests without a GPU have their own
#define URM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace urm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

enum ElementType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat8 = 3 };  // kFloat8: e4m3fn

// Strides are in elements; data may be null where a table has no such column.
struct Column {
  const void* data;
  int64_t type, stride;
};

struct Table {
  const void* items;
  int64_t type, rows, r, row_stride, column_stride;
  Column bias, row_scale;
};

enum MaskKind : int64_t { kNoMask = 0, kBytes = 1, kBits = 2 };

// Which rows a user may be given, as csrc/cpu/filter.h has it.
struct Filter {
  const uint8_t* mask;
  int64_t kind, user_stride, row_stride;
  const uint8_t* alive;    // bits of rows that have not been removed, or null
  const int64_t* exclude;  // [users, exclude_count], each ascending
  int64_t exclude_count;
};

// The row at a place among the codes, and the place of the row of that number.
struct Placed {
  uint32_t row, place;
};

// A packed table's codes (csrc/common/codes.h).
struct Codes {
  const unsigned char* blocks;
  int64_t count;              // of blocks
  const unsigned char* fine;  // or null
  const float* reference;     // of lost and norm
  const Placed* order;        // [count * 32]; null: codes lie in the order of their rows
  const float* bias;          // [count * 32], the table's in the order of the codes; or null
};

// Runs of rows that are alike, in the order of their codes; blocks behind the last whole run belong to none. Of each a
// code stands for all of its rows, and bounds follow for every user, over the user's step.
struct Cells {
  int64_t count, blocks_of_cell;
  const float* most;  // [count], the largest bias of a cell; or null
  float* bounds;      // [B, count]
};

// Tiles that a scan reads, of each column group; null: all, in their order.
struct TileLists {
  int32_t* tiles;  // [column groups, room]
  int32_t* count;  // [column groups]
  int64_t room;
};

// Queries as they come, and what becomes of them. A user's existing queries lie side by side from the first place on;
// under a sum or mean there is one. Places behind them hold nothing.
struct Users {
  const float* queries;  // [B, places, r]
  const int32_t* count;  // [B]
  int64_t B, places;
  int64_t log_sum_exp;
};

}  // namespace urm
