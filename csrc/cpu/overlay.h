// Rows of a table that have been replaced while older readers still scan: the new contents, to be read instead of what
// the table holds, which somebody may be writing at that very moment.
#pragma once

#include <algorithm>
#include <cstdint>

#include "views.h"

namespace urm {

struct Overlay {
  const int64_t* rows = nullptr;  // [count], ascending, all different
  int64_t count = 0;
  MatrixView items;      // [count, r]
  MatrixView bias;       // [1, count] or null, as the table has one
  MatrixView row_scale;  // likewise
  int64_t row_step = 1;  // rows are asked for by their number in units of this

  // The same for every step-th row.
  Overlay sampled(int64_t step) const {
    Overlay sample = *this;
    sample.row_step *= step;
    return sample;
  }

  // The first replaced row that is not before `row`, as a place in `rows`.
  int64_t from(int64_t row) const { return std::lower_bound(rows, rows + count, row * row_step) - rows; }

  // The place that replaces `row`, -1 where none does.
  int64_t of(int64_t row) const {
    if (!count) return -1;
    const int64_t place = from(row);
    return place < count && rows[place] == row * row_step ? place : -1;
  }

  // Calls replace(place, lane) for every replaced row among [row, row + lanes).
  template <class F>
  void each(int64_t row, int64_t lanes, F replace) const {
    if (!count) return;
    const int64_t end = (row + lanes - 1) * row_step;
    for (int64_t place = from(row); place < count && rows[place] <= end; ++place)
      if (rows[place] % row_step == 0) replace(place, rows[place] / row_step - row);
  }
};

}  // namespace urm
