// The level above a packed table's codes: one code for each cell of rows that are alike. A cell whose bound is below a
// user's threshold is not read.
#pragma once

#include <vector>

#include "code_scanner.h"
#include "topk_results.h"
#include "workspace.h"

namespace urm {

// Bounds of all cells for the group's users, if the table has cells and these rule out enough, which a sample of them
// decides. They are in group.cell_bounds then, and the most promising cells have been scanned: their rows are in
// `results`, and their bounds say that nothing is left to do.
void use_cells(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results);

// Upper bounds of every cell's rows, [cells][users].
AlignedVector<float> bounds_of_cells(Group& group, std::vector<Workspace>& work);

// Scans a cell's blocks by their codes, for users whose bound reaches their threshold; blocks with a row that has been
// replaced are left out. `next` is the cell that will be asked then, -1 where that is not known. Returns how many pairs
// survived.
template <class Results>
int64_t scan_cell(const Group& group, CodeScanner<Results>& scanner, int64_t cell, const float* bounds, int64_t next) {
  const int64_t blocks = group.request.codes.cells.rows / kBlockRows, first = cell * blocks, end = first + blocks;
  int64_t survived = 0;
  for (int64_t block = first; block < end;) {
    const int64_t replaced = std::min(end, group.next_replaced(block * kBlockRows) / kBlockRows);
    const int64_t stop = std::min(replaced, block + kStretchBlocks);
    const int64_t then = stop < end ? stop : next < 0 ? group.request.codes.count : next * blocks;
    if (block < stop) survived += scanner.scan_cell(block, stop - block, bounds, then);
    block = stop < replaced ? stop : replaced + (replaced < end);
  }
  return survived;
}

}  // namespace urm
