// Canonical dots of chosen rows with every query of their user.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "queries.h"
#include "views.h"

namespace urm {

// out[user, query, c] = canonical dot of query and row candidates[user, c]; candidates -1 count as a row of zeros.
void candidate_dots(const QueriesView& queries, const MatrixView& items, const int64_t* candidates, int64_t count,
                    int threads, const Kernels& kernels, float* out);

}  // namespace urm
