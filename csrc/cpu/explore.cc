#include "explore.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "../common/gumbel.h"
#include "../common/total_order.h"
#include "candidates.h"
#include "float_environment.h"
#include "row_set.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kRowsAtOnce = 1 << 20;  // scored rows of the users that walk together
constexpr int64_t kNoiseAtOnce = 1024;    // rows whose noise is made between two looks at the counter

// Each round has noise of its own: a seed derived from the call's, in a stream that no user has.
uint64_t seed_of_round(uint64_t seed, int64_t round) {
  return random_bits(seed, ~uint64_t{0}, static_cast<uint64_t>(round));
}

// One row of each of `count` equal parts of all rows.
int64_t row_of_part(uint64_t seed, uint64_t stream, int64_t part, int64_t count, int64_t rows) {
  const uint64_t n = static_cast<uint64_t>(rows), parts = static_cast<uint64_t>(count);
  const uint64_t begin = static_cast<uint64_t>(part) * n / parts, end = static_cast<uint64_t>(part + 1) * n / parts;
  return static_cast<int64_t>(begin +
                              ((random_bits(seed, stream, static_cast<uint64_t>(part)) >> 33) * (end - begin) >> 31));
}

// Whether scaled + noise is certainly below `least`, seen without a logarithm: noise is at most -log(v), v is at least
// the first word's share of 2^32, and two thousandths are more than all roundings where numbers are below 2^10.
bool stays_below(float scaled, uint64_t bits, float least) {
  if (!(std::fabs(scaled) < 1024.0f && std::fabs(least) < 1024.0f)) return false;
  return static_cast<float>(bits >> 32) * 0x1p-32f > 1.002f * std::exp(scaled - least);
}

// What a user has scored. Vectors have room before threads write to them.
struct Walk {
  std::vector<uint32_t> rows;  // without those whose score is NaN
  std::vector<float> scores;
  std::vector<uint8_t> followed;  // whether its neighbours were taken
  std::vector<uint64_t> keys;     // perturbed, of this round
  std::vector<uint64_t> chosen;
  std::vector<int64_t> fresh;  // to be scored
  RowSet seen;
  float least = 0;  // that a key of this round must reach
};

class Explorer {
 public:
  Explorer(const ExploreRequest& request, int64_t first_user, int64_t users)
      : request_(sampled(request, first_user, first_user + users, 1)),
        first_user_(first_user),
        users_(users),
        all_users_(request.queries.users),
        walks_(users) {}

  bool run() {
    for (int64_t round = 0; round <= static_cast<int64_t>(request_.widths.size()); ++round) {
      if (request_.interrupted && request_.interrupted()) return false;
      if (round == 0) begin();
      else go_on(round);
      score(round);
    }
    finish();
    return true;
  }

 private:
  uint64_t stream(int64_t user) const { return static_cast<uint64_t>(request_.streams[first_user_ + user]); }

  bool has_queries(int64_t user) const {
    const QueriesView& queries = request_.queries;
    if (!queries.exists) return queries.queries > 0;
    const uint8_t* exists = queries.exists + user * queries.queries;
    return std::any_of(exists, exists + queries.queries, [](uint8_t e) { return e != 0; });
  }

  // Calls body(task) for every task, on several threads where there are several tasks.
  template <class Body>
  void each(int64_t tasks, Body body) const {
    std::atomic<int64_t> next{0};
    const int threads = static_cast<int>(std::clamp<int64_t>(request_.threads, 1, std::max<int64_t>(tasks, 1)));
    run_parallel(threads, [&](int) {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(task);
    });
  }

  void begin() {
    const int64_t rows = request_.items.rows, count = std::min(request_.first, rows);
    const uint64_t seed = seed_of_round(request_.seed, 0);
    for (int64_t user = 0; user < users_; ++user) {
      if (!has_queries(user)) continue;
      walks_[user].fresh.resize(count);
      walks_[user].seen.reserve_more(count);
    }
    each(users_, [&](int64_t user) {
      Walk& walk = walks_[user];
      for (std::size_t part = 0; part < walk.fresh.size(); ++part) {
        const int64_t row = row_of_part(seed, stream(user), static_cast<int64_t>(part), count, rows);
        walk.fresh[part] = row;
        walk.seen.insert(static_cast<uint32_t>(row));
      }
    });
  }

  // Draws good rows and takes their neighbours.
  void go_on(int64_t round) {
    const int64_t width = request_.widths[round - 1];
    const uint64_t seed = seed_of_round(request_.seed, round);
    bound_keys(seed, width);
    make_keys(seed);
    for (Walk& walk : walks_) {
      const int64_t known = static_cast<int64_t>(walk.rows.size()), drawn = std::min(width, known);
      const int64_t more = most_neighbors(drawn);
      walk.seen.reserve_more(more);
      walk.fresh.clear();
      walk.fresh.reserve(more);
    }
    each(users_, [&](int64_t user) {
      if (request_.wide) follow(static_cast<const int64_t*>(request_.neighbors), width, walks_[user]);
      else follow(static_cast<const int32_t*>(request_.neighbors), width, walks_[user]);
    });
  }

  int64_t most_neighbors(int64_t drawn) const {
    const int64_t rows = request_.items.rows;
    return request_.degree && drawn > rows / request_.degree ? rows : drawn * request_.degree;
  }

  // What each user's last drawn row has at least: the least of the rows that scores alone would draw.
  void bound_keys(uint64_t seed, int64_t width) {
    for (Walk& walk : walks_) walk.chosen.reserve(walk.rows.size());
    each(users_, [&](int64_t user) {
      Walk& walk = walks_[user];
      walk.least = -std::numeric_limits<float>::infinity();
      walk.chosen.clear();
      for (std::size_t i = 0; i < walk.rows.size(); ++i)
        if (!walk.followed[i]) walk.chosen.push_back(pack_key(walk.scores[i], walk.rows[i]));
      if (width <= 0 || static_cast<int64_t>(walk.chosen.size()) <= width) return;
      std::nth_element(walk.chosen.begin(), walk.chosen.begin() + (width - 1), walk.chosen.end(),
                       std::greater<uint64_t>());
      float least = std::numeric_limits<float>::infinity();
      for (int64_t i = 0; i < width; ++i)
        least = std::min(least, perturbed_score(key_score(walk.chosen[i]), request_.temperature, seed, stream(user),
                                                key_row(walk.chosen[i])));
      walk.least = least;
    });
  }

  void make_keys(uint64_t seed) {
    std::vector<int64_t> starts(1, 0);  // of the users' tasks
    for (Walk& walk : walks_) {
      walk.keys.resize(walk.rows.size());
      starts.push_back(starts.back() + (static_cast<int64_t>(walk.rows.size()) + kNoiseAtOnce - 1) / kNoiseAtOnce);
    }
    each(starts.back(), [&](int64_t task) {
      const int64_t user = std::upper_bound(starts.begin(), starts.end(), task) - starts.begin() - 1;
      Walk& walk = walks_[user];
      const int64_t first = (task - starts[user]) * kNoiseAtOnce;
      const int64_t last = std::min<int64_t>(first + kNoiseAtOnce, static_cast<int64_t>(walk.rows.size()));
      for (int64_t i = first; i < last; ++i) {
        walk.keys[i] = kNoKey;
        if (walk.followed[i]) continue;
        const float scaled = scaled_score(walk.scores[i], request_.temperature);
        const uint64_t bits = random_bits(seed, stream(user), walk.rows[i]);
        if (!stays_below(scaled, bits, walk.least))
          walk.keys[i] = pack_key(scaled + noise_of_bits(bits) + 0.0f, walk.rows[i]);
      }
    });
  }

  template <class Index>
  void follow(const Index* neighbors, int64_t width, Walk& walk) const {
    walk.chosen.clear();
    for (uint64_t key : walk.keys)
      if (key != kNoKey) walk.chosen.push_back(key);
    const int64_t drawn = std::min<int64_t>(width, static_cast<int64_t>(walk.chosen.size()));
    if (!drawn) return;
    std::nth_element(walk.chosen.begin(), walk.chosen.begin() + (drawn - 1), walk.chosen.end(),
                     std::greater<uint64_t>());
    const uint64_t floor = walk.chosen[drawn - 1];
    for (std::size_t i = 0; i < walk.keys.size(); ++i) {
      if (walk.keys[i] < floor) continue;
      walk.followed[i] = 1;
      const Index* of_row = neighbors + static_cast<int64_t>(walk.rows[i]) * request_.degree;
      for (int64_t j = 0; j < request_.degree; ++j)
        if (static_cast<uint64_t>(of_row[j]) < static_cast<uint64_t>(request_.items.rows) &&
            walk.seen.insert(static_cast<uint32_t>(of_row[j])))
          walk.fresh.push_back(of_row[j]);
    }
  }

  // Scores the fresh rows of all users, as many places a user as the longest list needs.
  void score(int64_t round) {
    int64_t width = 0;
    for (int64_t user = 0; user < users_; ++user) {
      const int64_t count = static_cast<int64_t>(walks_[user].fresh.size());
      request_.scored[round * all_users_ + first_user_ + user] = count;
      width = std::max(width, count);
    }
    candidates_.resize(users_ * width);
    scores_.resize(users_ * width);
    for (int64_t user = 0; user < users_; ++user) {
      const Walk& walk = walks_[user];
      int64_t* own = candidates_.data() + user * width;
      std::fill(std::copy(walk.fresh.begin(), walk.fresh.end(), own), own + width, -1);
    }
    CandidatesRequest candidates;
    static_cast<Request&>(candidates) = request_;
    candidates.candidates = candidates_.data();
    candidates.count = width;
    score_candidates(candidates, scores_.data());
    for (int64_t user = 0; user < users_; ++user) {
      Walk& walk = walks_[user];
      const float* scores = scores_.data() + user * width;
      for (std::size_t i = 0; i < walk.fresh.size(); ++i) {
        if (scores[i] != scores[i]) continue;
        walk.rows.push_back(static_cast<uint32_t>(walk.fresh[i]));
        walk.scores.push_back(scores[i]);
        walk.followed.push_back(0);
      }
    }
  }

  void finish() {
    for (Walk& walk : walks_) walk.chosen.reserve(walk.rows.size());
    each(users_, [&](int64_t user) {
      Walk& walk = walks_[user];
      walk.chosen.clear();
      for (std::size_t i = 0; i < walk.rows.size(); ++i)
        if (request_.filter.allows(user, walk.rows[i])) walk.chosen.push_back(pack_key(walk.scores[i], walk.rows[i]));
      const int64_t found = std::min<int64_t>(request_.k, static_cast<int64_t>(walk.chosen.size()));
      std::partial_sort(walk.chosen.begin(), walk.chosen.begin() + found, walk.chosen.end(), std::greater<uint64_t>());
      float* scores = request_.scores + (first_user_ + user) * request_.k;
      int64_t* ids = request_.ids + (first_user_ + user) * request_.k;
      for (int64_t i = 0; i < found; ++i) {
        scores[i] = key_score(walk.chosen[i]);
        ids[i] = key_row(walk.chosen[i]);
      }
      std::fill(scores + found, scores + request_.k, -std::numeric_limits<float>::infinity());
      std::fill(ids + found, ids + request_.k, -1);
    });
  }

  const ExploreRequest request_;
  const int64_t first_user_, users_, all_users_;
  std::vector<Walk> walks_;
  AlignedVector<int64_t> candidates_;
  AlignedVector<float> scores_;
};

}  // namespace

bool explore_topk(const ExploreRequest& request) {
  const DefaultFloatEnvironment environment;
  const int64_t rows = request.items.rows, users = request.queries.users;
  int64_t most = std::min(request.first, rows);
  for (int64_t width : request.widths) {
    if (request.degree && width > (rows - most) / request.degree) most = rows;
    else most += width * request.degree;
  }
  const int64_t together = std::max<int64_t>(kRowsAtOnce / std::max<int64_t>(most, 1), 4 * request.threads);
  for (int64_t first = 0; first < users; first += together)
    if (!Explorer(request, first, std::min(together, users - first)).run()) return false;
  return true;
}

}  // namespace urm
