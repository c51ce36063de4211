// A group's queries as codes: rotated, rounded to 8 bits with one step a user.
#pragma once

#include "aligned.h"
#include "code_kernels.h"
#include "kernels.h"
#include "queries.h"

namespace urm {

constexpr int kCellBits = 4;

// Cells: runs of rows that are alike, in the order of their codes, and for each a code that stands for all of its rows
// (docs/design.md). These codes lie as a table's own.
struct Cells {
  int64_t rows = 0;  // of a cell, whole blocks; 0 where there are none
  int64_t count = 0;
  const char* blocks = nullptr;  // [count / 32, rounded up], of kCellBits
  float lost_reference = 0, norm_reference = 0;
  const float* bias = nullptr;  // [count], the largest of a cell's rows; or null
};

// The row at a place among the codes, and the place of the row of that number.
struct Placed {
  uint32_t row, place;
};

// A packed table's codes; `bits` is 0 where there are none.
struct Codes {
  int bits = 0;
  const char* blocks = nullptr;
  int64_t count = 0;           // of blocks
  const char* fine = nullptr;  // or null
  Rotation rotation;
  float lost_reference = 0, norm_reference = 0;
  const Placed* order = nullptr;  // [rows()]; null: codes lie in the order of their rows
  const float* bias = nullptr;    // [rows()], in the order of the codes; or null
  Cells cells{};
  float slack = 1, fine_slack = 1;  // shares of the certain slack; below 1 bounds are probable

  int64_t rows() const { return count * kBlockRows; }
  bool probable() const { return slack < 1 || fine_slack < 1; }

  // An order from a file may be none: what it says is then wrong, and lies within the table all the same.
  int64_t row_at(int64_t place) const { return within(order[place].row, place); }
  int64_t place_of(int64_t row) const { return within(order[row].place, row); }

 private:
  int64_t within(int64_t at, int64_t otherwise) const { return at < rows() ? at : otherwise; }
};

struct QueryCodes {
  AlignedVector<int8_t> codes;                    // [groups][quads][16][4], see CodeSums
  AlignedVector<int32_t> starts;                  // [groups * 16] of a scan's sums: slack, less offset * sum
  AlignedVector<int32_t> row_starts;              // of one row's sums, which have no slack
  AlignedVector<float> kept, lost;                // [groups * 16]
  AlignedVector<float> likely_kept, likely_lost;  // likewise, times fine_slack where bounds are probable
  AlignedVector<int64_t> first_group;             // of each user
  AlignedVector<CodeBound> bounds;                // likewise
  int64_t most_groups = 0;                        // of a user

  bool empty() const { return bounds.empty(); }
};

// Empty where some query is too long, or not finite, for a certain bound.
QueryCodes encode_queries(const PackedQueries& packed, int64_t users, int64_t padded, const Codes& codes,
                          const Kernels& kernels);

}  // namespace urm
