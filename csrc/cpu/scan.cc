#include "scan.h"

#include <algorithm>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "cell_bounds.h"
#include "float_environment.h"
#include "guess.h"
#include "promising.h"
#include "run_scan.h"
#include "scan_allowed.h"
#include "topk_results.h"

namespace urm {
namespace {

constexpr int64_t kGroupBufferBytes = 64 << 20;  // running top-k buffers of a group, and its bounds of cells

constexpr int64_t kFewRows = 1 << 16;   // no more rows than all threads can keep in their caches
constexpr int64_t kGroupsOfThread = 2;  // fewer, and some thread has nothing to do at the end

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
  const int64_t wanted = std::min(request.k, request.items.rows);
  return best.floor() == kNoKey || (k == wanted && (!k || *std::min_element(keys, keys + k) >= best.floor()));
}

bool scan_group(const TopKRequest& request, int64_t first, int64_t last, int64_t padded, bool guess,
                AlignedVector<float> guesses = {});

// The same request with certain bounds.
TopKRequest certain(const TopKRequest& request) {
  TopKRequest out = request;
  out.codes.slack = out.codes.fine_slack = 1;
  return out;
}

// False when interrupted. Users whose guessed threshold is refuted are scanned again without one.
bool scan_with_guesses(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results,
                       const AlignedVector<float>& guesses) {
  for (int64_t user = 0; user < static_cast<int64_t>(guesses.size()); ++user)
    if (guesses[user] > -std::numeric_limits<float>::infinity()) results.raise_floor(user, lowest_key(guesses[user]));
  if (request.k && !run_scan(group, work, results)) return false;
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

// `guesses`, where there are some already.
bool scan_group(const TopKRequest& request, int64_t first, int64_t last, int64_t padded, bool guess,
                AlignedVector<float> guesses) {
  Group group(request, first, last, padded);
  guess = guess && !request.few;
  group.guess = guess && !group.query_codes.empty();
  std::vector<Workspace> work = workspaces(group);
  const int64_t n = request.items.rows, k = std::min(request.k, n);
  TopKResults results(group, k, topk_buffer_capacity(k, n));
  if (request.few) use_few_blocks(request, group, work, results);
  if (guess) use_cells(request, group, work, results);
  if (!group.cell_bounds.empty()) group.guess = false;  // the best cells have more to say than a sample
  else if (guesses.empty() && group.guess) guesses = guess_by_codes(request, group, work);
  else if (guesses.empty() && guess && group.bounds.score) guesses = guess_thresholds(request, first, last);
  return scan_with_guesses(request, group, work, results, guesses);
}

// By probable bounds where these suit every user, else exactly.
bool scan_probably(const TopKRequest& request, int64_t first, int64_t last, int64_t padded) {
  Group group(request, first, last, padded);
  AlignedVector<float> guesses;
  if (!group.query_codes.empty()) {
    std::vector<Workspace> work = workspaces(group);
    const int64_t n = request.items.rows, k = std::min(request.k, n);
    TopKResults results(group, k, topk_buffer_capacity(k, n));
    if (guess_for_probable_bounds(request, group, work, guesses))
      return scan_with_guesses(request, group, work, results, group.least);
  }
  return scan_group(certain(request), first, last, padded, true, std::move(guesses));
}

// Where rows are shared by many queries their bytes do not bind, and plain scans are as fast as those of codes. Rows
// that are being replaced have no codes to be admitted by, and cells rule out more than less slack does. By the
// arguments of the call alone, for its result depends on it.
bool is_probable(const TopKRequest& request) {
  constexpr int64_t kMostQueries = 16;
  const bool added = request.reduce == Reduce::kSum || request.reduce == Reduce::kMean;
  return request.codes.probable() && request.scan != ScanMode::kExact && !request.overlay.count && request.k &&
         !request.codes.order && request.queries.users * (added ? 1 : request.queries.queries) <= kMostQueries;
}

// Many users of few rows: each thread scans the table for groups of its own.
template <class Scan>
bool scan_apart(const TopKRequest& request, int64_t groups, Scan scan) {
  std::vector<TopKRequest> parts(request.threads, request);
  std::vector<ScanCounts> counts(request.threads);
  for (int slot = 0; slot < request.threads; ++slot) {
    parts[slot].threads = 1;
    if (request.counts) parts[slot].counts = &counts[slot];
    if (slot) parts[slot].interrupted = nullptr;  // asked on the calling thread alone
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false}, no_memory{false};
  run_parallel(request.threads, [&](int slot) {
    const DefaultFloatEnvironment environment;
    try {
      for (int64_t group; !stop.load(std::memory_order_relaxed) && (group = next.fetch_add(1)) < groups;)
        if (!scan(parts[slot], group)) stop.store(true, std::memory_order_relaxed);
    } catch (const std::bad_alloc&) {
      no_memory = stop = true;
    }
  });
  if (no_memory.load()) throw std::bad_alloc();
  for (const ScanCounts& count : counts)
    if (request.counts) *request.counts += count;
  return !stop.load();
}

}  // namespace

bool scan_topk(const TopKRequest& request) {
  const DefaultFloatEnvironment environment;
  const QueriesView& queries = request.queries;
  const int64_t padded = padded_columns(queries);
  const int64_t capacity = topk_buffer_capacity(std::min(request.k, request.items.rows), request.items.rows);
  const int64_t cells = request.codes.cells.count * static_cast<int64_t>(sizeof(float));
  const int64_t by_memory = kGroupBufferBytes / std::max(8 * capacity, cells);
  const int64_t users = std::max<int64_t>(1, std::min(users_of_group(queries), by_memory));
  const int64_t groups = (queries.users + users - 1) / users;
  const bool probable = is_probable(request);
  const auto scan = [&](const TopKRequest& part, int64_t group) {
    const int64_t first = group * users, last = std::min(queries.users, first + users);
    return scan_allowed(part, first, last, [&](const TopKRequest& allowed, int64_t begin, int64_t end) {
      if (probable && !allowed.few) return scan_probably(allowed, begin, end, padded);
      return scan_group(certain(allowed), begin, end, padded, true);
    });
  };
  const TopKRequest asked = probable ? request : certain(request);
  if (request.threads > 1 && groups > kGroupsOfThread * request.threads && request.items.rows <= kFewRows)
    return scan_apart(asked, groups, scan);
  for (int64_t group = 0; group < groups; ++group)
    if (!scan(asked, group)) return false;
  return true;
}

}  // namespace urm
