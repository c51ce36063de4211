// Whether a thread bounds its next stretch of rows or scores it exactly.
#pragma once

#include <algorithm>
#include <cstdint>

#include "scan.h"

namespace urm {

// A bound that rules out too little costs more than it saves: at the start, while there is no threshold worth the name,
// and on data with too many near ties. After such a stretch the next ones are scored exactly, twice as many each time,
// so that data of that kind cost little more than without bounds. The result is the same either way.
class Pace {
 public:
  explicit Pace(ScanMode mode) : always_(mode == ScanMode::kBounded) {}

  bool next_is_bounded() {
    if (exact_left_ == 0) return true;
    --exact_left_;
    return false;
  }

  // `rescored` of `pairs` (row, user) survived the last bounded stretch.
  void judge(int64_t rescored, int64_t pairs) {
    if (always_ || rescored * kPairsPerRescore <= pairs) {
      penalty_ = 1;
    } else {
      exact_left_ = penalty_;
      penalty_ = std::min<int64_t>(2 * penalty_, kMostPenalty);
    }
  }

 private:
  static constexpr int64_t kPairsPerRescore = 8;  // about what rescoring a pair costs, in exact scores by the panel
  static constexpr int64_t kMostPenalty = 64;

  const bool always_;
  int64_t exact_left_ = 0, penalty_ = 1;
};

}  // namespace urm
