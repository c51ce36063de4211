// Which blocks of codes hold a row that masks allow: the others need not be read.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../common/codes.h"
#include "aligned.h"
#include "query_codes.h"

namespace urm {

class AllowedBlocks {
 public:
  // From the rows that masks allow: a list for each user from `first_user` on, or one for all.
  AllowedBlocks(const std::vector<AlignedVector<uint32_t>>& lists, const Codes& codes, int64_t first_user, int threads);

  // Of blocks [first, first + count), at most 32: the set of those that hold such a row.
  uint32_t among(int64_t user, int64_t first, int64_t count) const;

  // Whether one of blocks [first, first + count) holds such a row, of any user.
  bool any(int64_t first, int64_t count) const;

  // The first run of such blocks from `first` on, at most `most`: where it begins, and how many; of one list for all.
  std::pair<int64_t, int64_t> next_run(int64_t first, int64_t most) const;

  // In all lists.
  int64_t count() const { return count_; }

 private:
  int64_t first_user_, masks_, words_, count_ = 0;
  AlignedVector<uint64_t> found_;  // [masks][words]
};

}  // namespace urm
