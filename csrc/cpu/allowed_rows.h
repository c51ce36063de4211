// The rows that masks allow, as lists, where these are few: then they can be scored by themselves.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "filter.h"

namespace urm {

// A list for each mask of users [first, last), one where they share it: its rows below `rows`, ascending. None where
// these are more than `most` in all; exclusions are not asked.
std::vector<AlignedVector<uint32_t>> few_allowed(const Filter& filter, int64_t rows, int64_t first, int64_t last,
                                                 int64_t most, int threads);

}  // namespace urm
