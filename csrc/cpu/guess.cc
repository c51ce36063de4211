#include "guess.h"

#include <cmath>

namespace urm {
namespace {

constexpr int64_t kStep = 256;                // of the sample: its exact scores cost 0.4 % of an exact scan
constexpr int64_t kFewestRows = 1 << 16;      // a sample of 256
constexpr int64_t kFewestResults = 512;       // of a plain table: below, the running threshold is soon as good as a guess from two rows
constexpr double kDeviations = 3, kMore = 3;  // a guess is refuted once in a thousand, also where counts are small

// The exact score at `rank` among every kStep-th row.
AlignedVector<float> score_at_rank(const ScanRequest& request, int64_t first, int64_t last, int64_t rank) {
  const int64_t users = last - first;
  AlignedVector<float> scores(users * rank);
  AlignedVector<int64_t> ids(users * rank);
  TopKRequest sample;
  static_cast<ScanRequest&>(sample) = sampled(request, first, last, kStep);
  sample.k = rank;
  sample.scores = scores.data();
  sample.ids = ids.data();
  scan_topk(sample);
  AlignedVector<float> found(users);
  for (int64_t user = 0; user < users; ++user) found[user] = scores[(user + 1) * rank - 1];
  return found;
}

}  // namespace

AlignedVector<float> guess_thresholds(const TopKRequest& request, int64_t first, int64_t last) {
  const int64_t fewest = request.codes.bits ? 1 : kFewestResults;
  if (request.items.rows < kFewestRows || request.k < fewest || request.k > request.items.rows / 2) return {};
  const double expected = static_cast<double>(request.k) / kStep;
  const int64_t rank = static_cast<int64_t>(std::ceil(expected + kDeviations * std::sqrt(expected) + kMore));
  return score_at_rank(request, first, last, rank);
}

AlignedVector<float> best_of_sample(const ScanRequest& request, int64_t first, int64_t last) {
  if (request.items.rows < kFewestRows) return {};
  return score_at_rank(request, first, last, 1);
}

}  // namespace urm
