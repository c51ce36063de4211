// Scores of chosen rows.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "overlay.h"
#include "queries.h"
#include "views.h"

namespace urm {

struct CandidatesRequest {
  QueriesView queries;
  MatrixView items;
  MatrixView bias;       // [1, items] or data == nullptr
  MatrixView row_scale;  // likewise: a factor of the row's dots
  Overlay overlay;
  const uint8_t* alive = nullptr;  // bits of rows that have not been removed; null: all
  Reduce reduce = Reduce::kMax;
  const int64_t* candidates = nullptr;  // [users, count], or [count] where shared; -1: none
  int64_t count = 0;
  bool shared = false;
  int threads = 1;
  const Kernels* kernels = nullptr;
};

// out[user, c] = score of row candidates[user, c], NaN where a dot or the bias is; -inf for -1, removed rows and users
// without queries.
void score_candidates(const CandidatesRequest& request, float* out);

// out[user, query, c] = dot of the query, whether it exists or not, and the row; 0 for -1. Bias and reduction take no
// part.
void candidate_dots(const CandidatesRequest& request, float* out);

}  // namespace urm
