#include <algorithm>

#include "float_environment.h"
#include "guess.h"
#include "partition_results.h"
#include "run_scan.h"
#include "scan_allowed.h"

namespace urm {
namespace {

bool scan_group(const PartitionRequest& request, int64_t first, int64_t last, int64_t padded) {
  Group group(request, first, last, padded);
  PartitionResults results(group, request.temperature);
  if (!request.few && (group.bounds.score || !group.query_codes.empty())) {
    const AlignedVector<float> best = best_of_sample(request, first, last);
    for (int64_t user = 0; user < static_cast<int64_t>(best.size()); ++user) results.expect_score(user, best[user]);
  }
  std::vector<Workspace> work = workspaces(group);
  if (!run_scan(group, work, results)) return false;
  for (int64_t user = 0; user < group.users; ++user)
    request.out[first + user] = log_of_sum(results.sums_of(user), group.threads, group.users);
  return true;
}

}  // namespace

bool scan_partition(const PartitionRequest& request) {
  const DefaultFloatEnvironment environment;
  const int64_t padded = padded_columns(request.queries), users = users_of_group(request.queries);
  const auto scan = [&](const PartitionRequest& part, int64_t begin, int64_t end) {
    return scan_group(part, begin, end, padded);
  };
  for (int64_t first = 0; first < request.queries.users; first += users)
    if (!scan_allowed(request, first, std::min(request.queries.users, first + users), scan)) return false;
  return true;
}

}  // namespace urm
