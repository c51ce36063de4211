// The exact score of one row, at a place.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/log_sum_exp.h"
#include "group.h"
#include "workspace.h"

namespace urm {

// False where the score is NaN. Under max only the `count` chosen of the user's queries are asked, which hold the row's
// best one, or all of them; under logsumexp all are.
inline bool exact_score(const Group& group, Workspace& work, int64_t user, int64_t place, const int32_t* chosen,
                        int64_t count, float bias, float* score) {
  const ScanRequest& request = group.request;
  const Kernels& kernels = *request.kernels;
  const int64_t first = group.packed.start[user], queries = group.packed.start[user + 1] - first;
  const float* query = group.packed.rows.data() + first * group.padded;
  const float* factors = row_of(group, work, place);
  const float scale = request.row_scale.data ? *row_scale_of(group, work, place, 1) : 1.0f;
  const auto dot_with = [&](int64_t m) {
    const float dot = kernels.dot(factors, query + m * group.padded, group.padded);
    return request.row_scale.data ? dot * scale : dot;
  };
  if (request.reduce == Reduce::kLogSumExp) {
    for (int64_t m = 0; m < queries; ++m) work.user_dots[m] = dot_with(m);
    *score = canonical_log_sum_exp(work.user_dots.data(), 1, queries);
  } else {
    *score = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < count; ++j) {
      const float dot = dot_with(chosen[j]);
      if (dot != dot) return false;
      *score = std::max(*score, dot);
    }
  }
  if (request.bias.data) *score += bias;
  *score += 0.0f;  // -0 becomes +0
  return *score == *score;
}

}  // namespace urm
