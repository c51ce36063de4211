#include "candidates.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "aligned.h"
#include "float_environment.h"
#include "thread_pool.h"

namespace urm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSharingUsers = 64;       // users for whom a shared tile is gathered once
constexpr int64_t kTilesAhead = 2;          // whose rows are fetched
constexpr int64_t kQueriesAtOnce = 2;       // between which rows are fetched ahead
constexpr int64_t kDotsPerThread = 1 << 6;  // 16 dots each: what pays for waking a thread

struct Tile {
  const int64_t* rows;  // candidates
  int64_t width;
};

// One thread's working memory.
struct Work {
  AlignedVector<float> rows, dots, bias, row_scale;
};

class Visitor {
 public:
  Visitor(const CandidatesRequest& request, Reduce reduce)
      : request_(request),
        padded_(round_up(std::max<int64_t>(request.queries.r, 1), kLanes)),
        packed_(pack_queries(request.queries, reduce, 0, request.queries.users, padded_)) {}

  const PackedQueries& packed() const { return packed_; }

  // Calls use(user, first, tile, dots, work) for all tiles of all users' candidates, on several threads; dots are
  // [queries of the user, 16].
  template <class Use>
  void each(Use use) {
    const int64_t users = request_.queries.users, block = request_.shared ? kSharingUsers : 1;
    const int64_t tiles = (request_.count + kLanes - 1) / kLanes, tasks = (users + block - 1) / block * tiles;
    const int64_t dots = users ? tiles * packed_.total : 0;
    const int threads = static_cast<int>(std::clamp<int64_t>(dots / kDotsPerThread, 1, std::max(request_.threads, 1)));
    AlignedVector<Work> work(threads);
    for (Work& w : work) {
      w.rows.resize(kLanes * padded_);
      w.dots.resize(kLanes * std::max<int64_t>(request_.queries.queries, 1));
      w.bias.resize(kLanes);
      w.row_scale.resize(kLanes);
    }
    std::atomic<int64_t> next{0};
    run_parallel(threads, [&](int slot) {
      // Tasks are taken ahead of time: what this thread fetches, it will also read.
      const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
      int64_t taken[kTilesAhead];
      for (int64_t& task : taken) task = take();
      for (int64_t turn = 0, task; (task = taken[turn]) < tasks; turn = (turn + 1) % kTilesAhead) {
        const int64_t first_user = task / tiles * block, tile = task % tiles;
        const int64_t ahead = taken[turn] = take();
        const Tile next = ahead < tasks ? tile_at(ahead / tiles * block, ahead % tiles) : Tile{nullptr, 0};
        visit(first_user, std::min(users, first_user + block), tile_at(first_user, tile), next, tile * kLanes,
              work[slot], use);
      }
    });
  }

  // Elements of a vector that belongs to the table.
  const float* vector_of(const MatrixView& vector, const MatrixView& replacement, const Tile& tile, float* out) const {
    for (int64_t i = 0; i < tile.width; ++i) {
      const int64_t row = tile.rows[i], place = row < 0 || !replacement.data ? -1 : request_.overlay.of(row);
      out[i] = 0.0f;
      if (row >= 0)
        request_.kernels->widen(place < 0 ? part_of(vector, row, 1) : part_of(replacement, place, 1), 1, out + i);
    }
    return out;
  }

 private:
  Tile tile_at(int64_t user, int64_t tile) const {
    const int64_t* candidates = request_.candidates + (request_.shared ? 0 : user * request_.count);
    return {candidates + tile * kLanes, std::min<int64_t>(kLanes, request_.count - tile * kLanes)};
  }

  void gather(const Tile& tile, float* rows) const {
    const Overlay& overlay = request_.overlay;
    if (!overlay.count) return request_.kernels->gather(request_.items, tile.rows, tile.width, padded_, rows);
    int64_t present[kLanes], places[kLanes];
    for (int64_t i = 0; i < tile.width; ++i) {
      places[i] = tile.rows[i] < 0 ? -1 : overlay.of(tile.rows[i]);
      present[i] = places[i] < 0 ? tile.rows[i] : -1;
    }
    request_.kernels->gather(request_.items, present, tile.width, padded_, rows);
    for (int64_t i = 0; i < tile.width; ++i)
      if (places[i] >= 0) request_.kernels->widen(row_view(overlay.items, places[i]), padded_, rows + i * padded_);
  }

  // The share `step` of `steps` of a tile's memory: rows lie anywhere, so the processor cannot foresee them.
  __attribute__((always_inline)) inline void fetch(const Tile& tile, int64_t step, int64_t steps) const {
    const MatrixView& items = request_.items;
    if (items.column_stride != 1) return;
    const int64_t bytes = items.columns * element_bytes(items.dtype);
    for (int64_t i = tile.width * step / steps; i < tile.width * (step + 1) / steps; ++i) {
      if (tile.rows[i] < 0) continue;
      const char* row = row_address(items, tile.rows[i]);
      for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(row + byte, 0, 2);
    }
  }

  template <class Use>
  void visit(int64_t first_user, int64_t last_user, const Tile& tile, const Tile& next, int64_t first, Work& work,
             Use use) const {
    gather(tile, work.rows.data());
    const float* scales = nullptr;
    if (request_.row_scale.data)
      scales = vector_of(request_.row_scale, request_.overlay.row_scale, tile, work.row_scale.data());
    for (int64_t user = first_user; user < last_user; ++user) {
      const int64_t start = packed_.start[user], queries = packed_.start[user + 1] - start;
      const int64_t steps = (queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t q = step * kQueriesAtOnce;
        request_.kernels->dots_of_rows(work.rows.data(), padded_, packed_.rows.data() + (start + q) * padded_,
                                       std::min(kQueriesAtOnce, queries - q), padded_, Ahead{nullptr, 0},
                                       work.dots.data() + q * kLanes);
        if (user == first_user) fetch(next, step, steps);
      }
      if (scales) request_.kernels->scale_dots(scales, queries, kLanes, work.dots.data());
      use(user, first, tile, work);
    }
  }

  const CandidatesRequest& request_;
  const int64_t padded_;
  const PackedQueries packed_;
};

}  // namespace

void score_candidates(const CandidatesRequest& request, float* out) {
  const DefaultFloatEnvironment environment;
  Visitor visitor(request, request.reduce);
  const auto prune =
      request.reduce == Reduce::kLogSumExp ? request.kernels->prune_log_sum_exp : request.kernels->prune_max;
  visitor.each([&](int64_t user, int64_t first, const Tile& tile, Work& work) {
    const int64_t queries = visitor.packed().start[user + 1] - visitor.packed().start[user];
    float* target = out + user * request.count + first;
    if (!queries) return std::fill(target, target + tile.width, -kInfinity), void();
    const float* bias = nullptr;
    if (request.bias.data) bias = visitor.vector_of(request.bias, request.overlay.bias, tile, work.bias.data());
    float scores[kLanes];
    const uint32_t numbers = prune(work.dots.data(), kLanes, queries, bias, -kInfinity, scores);
    for (int64_t i = 0; i < tile.width; ++i) {
      const int64_t row = tile.rows[i];
      const bool there = row >= 0 && (!request.alive || (request.alive[row >> 3] >> (row & 7) & 1));
      target[i] = !there ? -kInfinity : numbers >> i & 1 ? scores[i] : std::numeric_limits<float>::quiet_NaN();
    }
  });
}

void candidate_dots(const CandidatesRequest& request, float* out) {
  const DefaultFloatEnvironment environment;
  Visitor visitor(request, Reduce::kMax);
  const int64_t m = request.queries.queries;
  visitor.each([&](int64_t user, int64_t first, const Tile& tile, Work& work) {
    for (int64_t q = 0; q < m; ++q) {
      const float* dots = work.dots.data() + q * kLanes;
      std::copy(dots, dots + tile.width, out + (user * m + q) * request.count + first);
    }
  });
}

}  // namespace urm
