// Scores of chosen rows.
#pragma once

#include <cstdint>

#include "request.h"

namespace urm {

struct CandidatesRequest : Request {
  const uint8_t* alive = nullptr;       // bits of rows that have not been removed; null: all
  const int64_t* candidates = nullptr;  // [users, count], or [count] where shared; -1: none
  int64_t count = 0;
  bool shared = false;
};

// out[user, c] = score of row candidates[user, c], NaN where a dot or the bias is; -inf for -1, removed rows and users
// without queries.
void score_candidates(const CandidatesRequest& request, float* out);

// out[user, query, c] = dot of the query, whether it exists or not, and the row; 0 for -1. Bias and reduction take no
// part.
void candidate_dots(const CandidatesRequest& request, float* out);

}  // namespace urm
