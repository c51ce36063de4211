// The bounds of a cheap score on their own, for tests of the inequality that bounded scans rest on.
#pragma once

#include "kernels.h"
#include "queries.h"
#include "views.h"

namespace urm {

// out[q, i] >= canonical dot of query q (users' queries in order) and row i, +inf where the cheap score gives no bound.
// False where `kernels` has no cheap score or it is not used for these queries at all.
bool upper_bounds(const QueriesView& queries, const MatrixView& items, const Kernels& kernels, float* out);

}  // namespace urm
