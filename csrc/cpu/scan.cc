#include "scan.h"

#include <algorithm>
#include <limits>

#include "float_environment.h"
#include "guess.h"
#include "run_scan.h"
#include "topk_results.h"

namespace urm {
namespace {

constexpr int64_t kGroupBufferBytes = 64 << 20;  // running top-k buffers of a group

// A user's keys, cut to k and written out. Returns whether these are certainly the k best: none was missed that reaches
// the floor, and k do.
bool write_user(const TopKRequest& request, const Group& group, TopKBuffer& best, int64_t user) {
  uint64_t* keys = best.keys();
  const int64_t found = best.size(), k = std::min(request.k, found);
  if (k < found) std::nth_element(keys, keys + k, keys + found, std::greater<uint64_t>());
  if (request.sorted) std::sort(keys, keys + k, std::greater<uint64_t>());
  float* scores = request.scores + (group.first_user + user) * request.k;
  int64_t* ids = request.ids + (group.first_user + user) * request.k;
  for (int64_t i = 0; i < k; ++i) {
    scores[i] = key_score(keys[i]);
    ids[i] = key_row(keys[i]);
  }
  std::fill(scores + k, scores + request.k, -std::numeric_limits<float>::infinity());
  std::fill(ids + k, ids + request.k, int64_t{-1});
  return best.floor() == kNoKey || (k == request.k && (!k || *std::min_element(keys, keys + k) >= best.floor()));
}

bool scan_group(const TopKRequest& request, int64_t first, int64_t last, int64_t padded, bool guess);

// The same request with certain bounds.
TopKRequest certain(const TopKRequest& request) {
  TopKRequest out = request;
  out.codes.slack = out.codes.fine_slack = 1;
  return out;
}

// False when interrupted. Users whose guessed threshold is refuted are scanned again without one.
bool scan_with_guesses(const TopKRequest& request, Group& group, std::vector<Workspace>& work,
                       const AlignedVector<float>& guesses) {
  const int64_t n = request.items.rows, k = std::min(request.k, n);
  TopKResults results(group, k, topk_buffer_capacity(k, n));
  for (int64_t user = 0; user < static_cast<int64_t>(guesses.size()); ++user)
    if (guesses[user] > -std::numeric_limits<float>::infinity()) results.raise_floor(user, lowest_key(guesses[user]));
  if (k && !run_scan(group, work, results)) return false;
  std::atomic<int64_t> next_user{0};
  AlignedVector<uint8_t> proven(group.users);
  run_parallel(static_cast<int>(std::min<int64_t>(group.threads, group.users)), [&](int) {
    for (int64_t user; (user = next_user.fetch_add(1)) < group.users;)
      proven[user] = write_user(request, group, results.best(user), user);
  });
  for (int64_t user = 0; user < group.users; ++user) {
    const int64_t at = group.first_user + user;
    // Without queries there is nothing that could be missed.
    if (request.proven)
      request.proven[at] = group.least.empty() || group.packed.start[user] == group.packed.start[user + 1];
    if (!proven[user] && !scan_group(certain(request), at, at + 1, group.padded, false)) return false;
  }
  return true;
}

bool scan_group(const TopKRequest& request, int64_t first, int64_t last, int64_t padded, bool guess) {
  Group group(request, first, last, padded);
  group.guess = guess && !group.query_codes.empty();
  std::vector<Workspace> work = workspaces(group);
  AlignedVector<float> guesses;
  if (group.guess) guesses = guess_by_codes(request, group, work);
  else if (guess && group.bounds.score) guesses = guess_thresholds(request, first, last);
  return scan_with_guesses(request, group, work, guesses);
}

// By probable bounds where these suit every user, else exactly.
bool scan_probably(const TopKRequest& request, int64_t first, int64_t last, int64_t padded) {
  Group group(request, first, last, padded);
  if (!group.query_codes.empty()) {
    std::vector<Workspace> work = workspaces(group);
    if (guess_for_probable_bounds(request, group, work)) return scan_with_guesses(request, group, work, group.least);
  }
  return scan_group(certain(request), first, last, padded, true);
}

// Where rows are shared by many queries their bytes do not bind, and plain scans are as fast as those of codes. Rows
// that are being replaced have no codes to be admitted by. By the arguments of the call alone, for its result depends
// on it.
bool is_probable(const TopKRequest& request) {
  constexpr int64_t kMostQueries = 16;
  const bool added = request.reduce == Reduce::kSum || request.reduce == Reduce::kMean;
  return request.codes.probable() && request.scan != ScanMode::kExact && !request.overlay.count && request.k &&
         request.queries.users * (added ? 1 : request.queries.queries) <= kMostQueries;
}

}  // namespace

bool scan_topk(const TopKRequest& request) {
  const DefaultFloatEnvironment environment;
  const QueriesView& queries = request.queries;
  const int64_t padded = padded_columns(queries);
  const int64_t capacity = topk_buffer_capacity(std::min(request.k, request.items.rows), request.items.rows);
  const int64_t by_memory = kGroupBufferBytes / (8 * capacity);
  const int64_t users = std::max<int64_t>(1, std::min(users_of_group(queries), by_memory));
  const bool probable = is_probable(request);
  const TopKRequest exact = certain(request);
  for (int64_t first = 0; first < queries.users; first += users) {
    const int64_t last = std::min(queries.users, first + users);
    if (!(probable ? scan_probably(request, first, last, padded) : scan_group(exact, first, last, padded, true)))
      return false;
  }
  return true;
}

}  // namespace urm
