#include "scan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "float_environment.h"
#include "guess.h"
#include "scanner.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kGroupQueries = 512;           // packed queries of a group stay in the second-level cache
constexpr int64_t kGroupBufferBytes = 64 << 20;  // running top-k buffers of a group, all threads together
constexpr int64_t kWorkPerThread = 1 << 22;      // multiply-adds that pay for waking a thread, about 0.2 ms
constexpr int64_t kChunkRows = 4096;             // rows handed out at a time

// The threads' buffers of one user, merged, cut to k and written out. Returns how many rows they held.
int64_t write_user(Group& group, int64_t user) {
  const ScanRequest& request = group.request;
  uint64_t* keys = group.keys.data() + user * group.threads * group.capacity;
  int64_t found = 0;
  for (int slot = 0; slot < group.threads; ++slot) {
    const TopKBuffer& buffer = group.buffer(slot, user);
    std::copy(buffer.keys(), buffer.keys() + buffer.size(), keys + found);
    found += buffer.size();
  }
  const int64_t k = std::min(request.k, found);
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
  return found;
}

int useful_threads(const ScanRequest& request, int64_t queries, int64_t padded) {
  if (request.all_threads) return request.threads;
  const double work = static_cast<double>(request.items.rows) * padded * std::max<int64_t>(queries, 4);
  return static_cast<int>(std::clamp<double>(work / kWorkPerThread, 1, std::max(request.threads, 1)));
}

// False when interrupted. Users whose guessed threshold is refuted are scanned again without one.
bool scan_group(const ScanRequest& request, int64_t first, int64_t last, int64_t padded, bool guess) {
  const int64_t n = request.items.rows, users = last - first;
  Group group{request, first, users, padded, pack_queries(request.queries, request.reduce, first, last, padded)};
  const int64_t queries = group.packed.total;
  if (queries > kDirectQueries) {
    group.panel.resize(query_panel_floats(queries, padded));
    pack_query_panel(group.packed.rows.data(), queries, padded, group.panel.data());
  }
  group.bounds = make_bounds(request, group.packed, users, padded);
  AlignedVector<float> guesses;
  if (guess && group.bounds.score) guesses = guess_thresholds(request, first, last);
  group.threads = useful_threads(request, queries, padded);
  const CheapScore* cheap = group.bounds.score;
  const int64_t wide = std::lcm(request.kernels->panel_rows, cheap ? cheap->panel_rows : 1);
  const int64_t share = group.threads == 1 ? n : n / (8 * group.threads);
  group.chunk_rows = round_up(std::clamp<int64_t>(share, 1, kChunkRows), wide);
  group.capacity = topk_buffer_capacity(std::min(request.k, n), n);
  group.keys.resize(users * group.threads * group.capacity);
  group.floors = AlignedVector<std::atomic<uint64_t>>(users);
  for (auto& floor : group.floors) floor.store(kNoKey, std::memory_order_relaxed);
  std::vector<Workspace> work;
  work.reserve(group.threads);
  for (int slot = 0; slot < group.threads; ++slot) {
    work.emplace_back(group);
    for (int64_t user = 0; user < users; ++user) {
      group.buffers.emplace_back(group.keys.data() + (user * group.threads + slot) * group.capacity,
                                 std::min(request.k, n), group.capacity);
      if (!guesses.empty()) group.buffers.back().raise_floor(lowest_key(guesses[user]));
    }
  }
  if (queries && n && request.k) run_parallel(group.threads, [&](int slot) { Scanner(group, work[slot], slot).run(); });
  if (group.stop.load()) return false;
  std::atomic<int64_t> next_user{0};
  AlignedVector<int64_t> found(users);
  run_parallel(static_cast<int>(std::min<int64_t>(group.threads, users)), [&](int) {
    for (int64_t user; (user = next_user.fetch_add(1)) < users;) found[user] = write_user(group, user);
  });
  for (int64_t user = 0; user < static_cast<int64_t>(guesses.size()); ++user) {
    const bool refuted = found[user] < request.k && guesses[user] > -std::numeric_limits<float>::infinity();
    if (refuted && !scan_group(request, first + user, first + user + 1, padded, false)) return false;
  }
  return true;
}

}  // namespace

bool scan_topk(const ScanRequest& request) {
  const DefaultFloatEnvironment environment;
  const QueriesView& queries = request.queries;
  const int64_t padded = round_up(std::max<int64_t>(queries.r, 1), kLanes);
  const int64_t per_user = std::max<int64_t>(1, queries.queries);
  const int64_t capacity = topk_buffer_capacity(std::min(request.k, request.items.rows), request.items.rows);
  const int64_t by_memory = kGroupBufferBytes / (8 * capacity * std::max(request.threads, 1));
  const int64_t users = std::max<int64_t>(1, std::min(kGroupQueries / per_user, by_memory));
  for (int64_t first = 0; first < queries.users; first += users)
    if (!scan_group(request, first, std::min(queries.users, first + users), padded, true)) return false;
  return true;
}

}  // namespace urm
