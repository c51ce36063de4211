// The bounds of a cheap score on their own, for tests of the inequality that bounded scans rest on.
#pragma once

#include "kernels.h"
#include "queries.h"
#include "query_codes.h"
#include "views.h"

namespace urm {

// out[q, i] >= canonical dot of query q (users' queries in order) and row i, +inf where the cheap score gives no bound.
// False where `kernels` has no cheap score or it is not used for these queries at all.
bool upper_bounds(const QueriesView& queries, const MatrixView& items, const Kernels& kernels, float* out);

// The same of codes. Of the scan, under max: out[user, i] for the user's best query; or of_queries: out[q, i] from a
// query's own lengths, as survivors are bounded. +inf behind the last block.
bool code_bounds(const QueriesView& queries, const MatrixView& items, const Codes& codes, const Kernels& kernels,
                 bool of_queries, float* out);

// And of cells, under max: out[cell, user] for all rows of the cell and the user's best query.
bool cell_bounds(const QueriesView& queries, const MatrixView& items, const Codes& codes, const Kernels& kernels,
                 float* out);

}  // namespace urm
