// Which blocks of codes hold a row that a user may be given: the others need not be read.
#pragma once

#include <cstdint>

#include "../common/codes.h"
#include "aligned.h"
#include "filter.h"
#include "query_codes.h"

namespace urm {

class AllowedBlocks {
 public:
  AllowedBlocks() = default;

  // Of users [first, last). Where codes lie in another order than the rows, blocks are found from the rows that a mask
  // allows: only where these are few, so that blocks without one are many.
  AllowedBlocks(const Filter& filter, const Codes& codes, int64_t rows, int64_t first_user, int64_t last_user,
                int threads);

  // False where all hold one, as far as is known.
  bool some() const { return filter_; }

  // Of blocks first, first + step, ..., `count` of them: the set of those that may hold such a row.
  uint32_t among(int64_t user, int64_t first, int64_t step, int64_t count) const;

 private:
  const Filter* filter_ = nullptr;  // null: all may
  int64_t first_user_ = 0;
  bool permuted_ = false;
  int64_t user_stride_ = 0, words_ = 0;  // of found_
  AlignedVector<uint64_t> found_;        // [masks][words]
  AlignedVector<uint8_t> is_found_;      // [masks]
};

}  // namespace urm
