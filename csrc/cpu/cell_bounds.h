// The level above a packed table's codes: one code for each cell of rows that are alike. A cell whose bound is below a
// user's threshold is not read.
#pragma once

#include <vector>

#include "code_scanner.h"
#include "topk_results.h"
#include "workspace.h"

namespace urm {

// Bounds of all cells for the group's users, if the table has cells and these rule out enough, which a sample of them
// decides. They are in group.cell_bounds then, and thresholds, which the best rows of the most promising cells reach,
// in `results`.
void use_cells(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results);

// Upper bounds of every cell's rows, [cells][users].
AlignedVector<float> bounds_of_cells(Group& group, std::vector<Workspace>& work);

// One thread's scan of the blocks of cells, for the users whose bound reaches their threshold.
template <class Results>
class CellScanner {
 public:
  CellScanner(const Group& group, Workspace& work, CodeScanner<Results>& scanner, Results& results, int slot)
      : group_(group), work_(work), scanner_(scanner), results_(results), slot_(slot) {}

  const ScanCounts& counts() const { return counts_; }

  // Blocks [begin, end). bounds(cell) are those of its users.
  template <class Bounds>
  void scan(int64_t begin, int64_t end, Bounds bounds) {
    uint32_t some = want(begin, end, bounds, work_.wanted.data());
    for (int64_t block = begin; block < end; block += kStretchBlocks) {
      const int64_t next = block + kStretchBlocks;
      const uint32_t then = next < end ? want(next, end, bounds, work_.next_wanted.data()) : 0;
      const int64_t blocks = std::min(kStretchBlocks, end - block);
      if (some) scanner_.scan_wanted(block, blocks, work_.wanted.data(), run_of(next, then));
      work_.wanted.swap(work_.next_wanted);
      some = then;
    }
  }

 private:
  // Of a stretch, each user's blocks, and all of them. Blocks with a row that has been replaced are left out.
  template <class Bounds>
  uint32_t want(int64_t first, int64_t end, Bounds bounds, uint32_t* wanted) {
    const int64_t of_cell = group_.request.codes.cells.rows / kBlockRows;
    const int64_t stop = std::min(end, first + kStretchBlocks);
    uint32_t some = 0, untouched = ~uint32_t{0};
    for (int64_t place = group_.next_replaced(first * kBlockRows); place < stop * kBlockRows;
         place = group_.next_replaced((place / kBlockRows + 1) * kBlockRows))
      untouched &= ~(1u << (place / kBlockRows - first));
    std::fill(wanted, wanted + group_.users, 0u);
    for (int64_t block = first; block < stop;) {
      const int64_t cell = block / of_cell, last = std::min(stop, (cell + 1) * of_cell);
      const uint32_t blocks = ((1u << (last - block)) - 1) << (block - first) & untouched;
      const float* of_users = bounds(cell);
      int64_t wants = 0;
      for (int64_t user = 0; user < group_.users; ++user)
        if (reaches(of_users[user], results_.threshold(slot_, user))) wanted[user] |= blocks, some |= blocks, ++wants;
      if (block % of_cell == 0) counts_.cells += group_.users, counts_.left_out += group_.users - wants;
      block = last;
    }
    return some;
  }

  // The first run of some blocks, as memory.
  Ahead run_of(int64_t first, uint32_t some) const {
    if (!some) return {nullptr, 0};
    const int from = __builtin_ctz(some), run = __builtin_ctz(~(some >> from));
    return scanner_.memory_of(first + from, run);
  }

  const Group& group_;
  Workspace& work_;
  CodeScanner<Results>& scanner_;
  Results& results_;
  const int slot_;
  ScanCounts counts_;
};

}  // namespace urm
