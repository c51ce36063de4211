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
      : group_(group),
        of_cell_(group.request.codes.cells.rows / kBlockRows),
        work_(work),
        scanner_(scanner),
        results_(results),
        slot_(slot) {}

  const ScanCounts& counts() const { return counts_; }

  // Blocks [begin, end). bounds(cell) are those of its users.
  template <class Bounds>
  void scan(int64_t begin, int64_t end, Bounds bounds) {
    next_ = begin;
    for (Part part = next_part(end, bounds, work_.wanted.data()); part.blocks;) {
      const Part then = next_part(end, bounds, work_.next_wanted.data());
      scanner_.scan_wanted(part.first, part.blocks, work_.wanted.data(), scanner_.memory_of(then.first, then.blocks));
      work_.wanted.swap(work_.next_wanted);
      part = then;
    }
  }

 private:
  struct Part {
    int64_t first, blocks;
  };

  // For few users a cell at a time: what is fetched ahead is then as long as what is summed meanwhile.
  int64_t most_blocks() const {
    constexpr int64_t kManyUsers = 16;
    return group_.users < kManyUsers ? std::min(of_cell_, kStretchBlocks) : kStretchBlocks;
  }

  // The next blocks of cells that some user wants, next to each other, and each user's of these.
  template <class Bounds>
  Part next_part(int64_t end, Bounds bounds, uint32_t* wanted) {
    Part part{next_, 0};
    std::fill(wanted, wanted + group_.users, 0u);
    while (next_ < end && part.blocks < most_blocks()) {
      if (!part.blocks) part.first = next_;
      const int64_t cell = next_ / of_cell_, last = std::min(end, (cell + 1) * of_cell_);
      const int64_t stop = std::min(last, part.first + most_blocks());
      const uint32_t blocks = untouched(next_, stop) << (next_ - part.first);
      const float* of_users = bounds(cell);
      int64_t wants = 0;
      for (int64_t user = 0; user < group_.users; ++user)
        if (reaches(of_users[user], results_.threshold(slot_, user))) wanted[user] |= blocks, ++wants;
      if (next_ % of_cell_ == 0) counts_.cells += group_.users, counts_.left_out += group_.users - wants;
      next_ = wants ? stop : last;
      if (wants) part.blocks = stop - part.first;
      else if (part.blocks) break;
    }
    return part;
  }

  // Those of [first, stop) none of whose rows has been replaced.
  uint32_t untouched(int64_t first, int64_t stop) const {
    uint32_t blocks = (1u << (stop - first)) - 1;
    for (int64_t place = group_.next_replaced(first * kBlockRows); place < stop * kBlockRows;
         place = group_.next_replaced((place / kBlockRows + 1) * kBlockRows))
      blocks &= ~(1u << (place / kBlockRows - first));
    return blocks;
  }

  const Group& group_;
  const int64_t of_cell_;  // blocks
  Workspace& work_;
  CodeScanner<Results>& scanner_;
  Results& results_;
  const int slot_;
  int64_t next_ = 0;  // block
  ScanCounts counts_;
};

}  // namespace urm
