// From a part of the rows to all of them: how far down its list of best ones a score has to stand so that k rows of the
// whole table are expected to reach it.
#pragma once

#include <cmath>
#include <cstdint>

namespace urm {

// `expected` of the k best rows are in the part on average. They come in lumps of `together`: 1 where each is there by
// its own luck, more where neighbours are alike and come or stay away as one. A guess is refuted about once in two
// thousand, also where counts are small.
inline int64_t rank_in_part(double expected, double together) {
  constexpr double kDeviations = 3.5, kMore = 3;
  return static_cast<int64_t>(std::ceil(expected + kDeviations * std::sqrt(expected * together) + kMore * together));
}

}  // namespace urm
