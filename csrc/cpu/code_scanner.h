// One thread's scan of a packed table: bounds from codes for every row, finer ones and the exact score for survivors.
#pragma once

#include <limits>

#include "group.h"
#include "workspace.h"

namespace urm {

// A bound of this says that there is nothing to be scanned; no other bound is as low.
constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline bool reaches(float bound, float threshold) {
  return bound != kNothing && !(bound < threshold);
}

template <class Results>
class CodeScanner {
 public:
  // Of every block, or every `block_step`-th, which is then called the next.
  CodeScanner(const Group& group, Workspace& work, Results& results, int slot, int64_t block_step = 1)
      : group_(group),
        request_(group.request),
        kernels_(*group.request.kernels),
        codes_(group.request.codes),
        queries_(group.query_codes),
        r_(group.request.items.columns),
        work_(work),
        results_(results),
        slot_(slot),
        step_(block_step) {}

  // At most kStretchBlocks blocks, none of whose rows has been replaced. Returns how many pairs survived; these wait,
  // while their rows are fetched, until the next call.
  int64_t scan(int64_t first_block, int64_t blocks);

  // The same of those blocks (bit b: first_block + b) that each user wants; `ahead` will be wanted next.
  int64_t scan_wanted(int64_t first_block, int64_t blocks, const uint32_t* wanted, Ahead ahead);

  // Hands the results bounds in place of scores, and places in place of rows; nothing is scored.
  void take_bounds(int64_t user, int64_t first_block, int64_t blocks, Ahead ahead);

  Ahead memory_of(int64_t first_block, int64_t blocks) const;

  // A pair that is to be scored, with the others that wait.
  void keep(const Survivor& survivor);

  // Scores the pairs that still wait.
  void finish();

  // Upper bounds of the rows of a block, under max, [32]; and of one row's dots with a user's queries, of chosen groups
  // of 16 (see Survivor), in their places.
  void bounds_of_block(int64_t user, int64_t block, float* bounds);
  void bounds_of_row(int64_t user, int64_t place, uint64_t groups, float* bounds, bool likely = false);

  // Where bounds are probable, whose rows the result consists of: the rows of a block whose bound reaches what it has
  // to (group.least), and whether a row of a block does, also by its fine code.
  uint32_t reach_of_block(int64_t user, int64_t block);
  bool admits(int64_t user, int64_t place);

  const ScanCounts& counts() const { return counts_; }

 private:
  struct Chosen {
    int64_t place, user, count;
  };

  int64_t scan_users(int64_t first_block, int64_t blocks, const uint32_t* wanted, Ahead ahead);
  int64_t scan_user(int64_t user, int64_t first_block, uint32_t some, const float* bias, Ahead ahead);

  void sum_blocks(int64_t user, int64_t first_block, int64_t blocks, Ahead ahead);
  void prune(int64_t user, int64_t first_block, int64_t blocks, const float* bias, float* bounds, uint32_t* survivors);
  const float* bias_of_blocks(int64_t first_block, int64_t blocks);
  int64_t groups_of(int64_t user) const;
  uint64_t groups_that_reach(int64_t user, int64_t place, int64_t i, int64_t rows, float bound) const;
  void rescore(AlignedVector<Survivor>& pairs);
  int64_t choose(const Survivor& pair, int32_t* chosen);
  bool fine_reaches(int64_t user, int64_t place);
  float bound_of_score(int64_t user, const float* bounds, float bias) const;
  bool probable() const { return !group_.least.empty(); }
  CodedRow coded_row(int64_t place);
  const char* block_of(int64_t place) const;
  float bias_of_row(int64_t place);
  void fetch(const char* from, int64_t bytes) const;
  void fetch_row(int64_t place) const;

  const Group& group_;
  const ScanRequest& request_;
  const Kernels& kernels_;
  const Codes& codes_;
  const QueryCodes& queries_;
  const int64_t r_;
  Workspace& work_;
  Results& results_;
  const int slot_;
  const int64_t step_;
  ScanCounts counts_;
};

}  // namespace urm
