#include "scan.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "aligned.h"
#include "float_environment.h"
#include "thread_pool.h"
#include "topk_buffer.h"

namespace urm {
namespace {

constexpr int64_t kGroupQueries = 512;           // packed queries of a group stay in the second-level cache
constexpr int64_t kGroupBufferBytes = 64 << 20;  // running top-k buffers of a group, all threads together
constexpr int64_t kDirectQueries = 8;            // up to here rows are read as they lie, above by transposed panels
constexpr int64_t kWorkPerThread = 1 << 22;      // multiply-adds that pay for waking a thread, about 0.2 ms
constexpr int64_t kAheadTiles = 2;               // distance of the software prefetch
constexpr int64_t kChunkRows = 4096;             // rows handed out at a time
constexpr int64_t kCachedBytes = 1 << 20;  // a table that stays in the second-level cache gains nothing by prefetching
constexpr int64_t kCacheLine = 64;

// What all threads of one group's scan share.
struct Group {
  const ScanRequest& request;
  int64_t first_user, users, padded;
  PackedQueries packed;
  AlignedVector<float> panel{};  // packed queries for the panel kernel; empty on the direct path
  int threads = 1;
  int64_t chunk_rows = kChunkRows;
  int64_t capacity = 0;
  AlignedVector<uint64_t> keys{};                 // [users, threads, capacity]
  AlignedVector<TopKBuffer> buffers{};            // [threads, users]
  AlignedVector<std::atomic<uint64_t>> floors{};  // [users]
  std::atomic<int64_t> next_chunk{0};
  std::atomic<bool> stop{false};

  bool direct() const { return panel.empty(); }
  TopKBuffer& buffer(int slot, int64_t user) { return buffers[slot * users + user]; }
};

// One thread's working memory, allocated before the threads start.
struct Workspace {
  AlignedVector<float> rows, panel, dots, bias;

  Workspace(const Group& group, int panel_rows)
      : rows(kLanes * group.padded),
        panel(group.direct() ? 0 : panel_rows * group.padded),
        dots(round_up(group.packed.total, kQueryGroup) * panel_rows),
        bias(panel_rows) {}
};

class Scanner {
 public:
  Scanner(Group& group, Workspace& work, int slot)
      : group_(group), request_(group.request), kernels_(*group.request.kernels), work_(work), slot_(slot) {}

  void run() {
    const int64_t n = request_.items.rows;
    for (;;) {
      const int64_t begin = group_.next_chunk.fetch_add(1, std::memory_order_relaxed) * group_.chunk_rows;
      if (begin >= n || group_.stop.load(std::memory_order_relaxed)) return;
      adopt_floors();
      const int64_t end = std::min(n, begin + group_.chunk_rows);
      if (group_.direct()) scan_rows(begin, end);
      else scan_panels(begin, end);
      publish_floors();
      if (slot_ == 0 && request_.interrupted && request_.interrupted())
        group_.stop.store(true, std::memory_order_relaxed);
    }
  }

 private:
  void scan_rows(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - row);
      int64_t stride;
      const float* rows = tile(row, count, &stride);
      kernels_.dots_of_rows(rows, stride, group_.packed.rows.data(), group_.packed.total, group_.padded,
                            ahead(row + kAheadTiles * kLanes, kLanes), work_.dots.data());
      select(row, count, work_.dots.data(), kLanes);
    }
  }

  void scan_panels(int64_t begin, int64_t end) {
    const int64_t wide = kernels_.panel_rows;
    for (int64_t row = begin; row < end; row += wide) {
      for (int64_t column = 0; column < wide; column += kLanes) {
        int64_t stride;
        const float* rows = tile(row + column, std::clamp<int64_t>(end - row - column, 0, kLanes), &stride);
        kernels_.transpose(rows, stride, group_.padded, static_cast<int>(column), work_.panel.data());
      }
      kernels_.dots_of_panel(work_.panel.data(), group_.panel.data(), group_.packed.total, group_.padded,
                             ahead(row + wide, wide), work_.dots.data());
      for (int64_t column = 0; column < wide && row + column < end; column += kLanes)
        select(row + column, std::min<int64_t>(kLanes, end - row - column), work_.dots.data() + column, wide);
    }
  }

  // 16 padded fp32 rows: the table itself where it has that form, else widened into the workspace.
  const float* tile(int64_t row, int64_t count, int64_t* stride) {
    const MatrixView& items = request_.items;
    if (items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == group_.padded &&
        count == kLanes) {
      *stride = items.row_stride;
      return reinterpret_cast<const float*>(row_address(items, row));
    }
    kernels_.stage(items, row, count, group_.padded, work_.rows.data());
    *stride = group_.padded;
    return work_.rows.data();
  }

  // Where rows follow each other without a gap, the memory of `count` of them.
  Ahead ahead(int64_t row, int64_t count) const {
    const MatrixView& items = request_.items;
    if (items.column_stride != 1 || items.row_stride != items.columns || row + count > items.rows) return {nullptr, 0};
    const int64_t row_bytes = items.columns * element_bytes(items.dtype);
    if (items.rows * row_bytes <= kCachedBytes) return {nullptr, 0};
    return {row_address(items, row), count * row_bytes / kCacheLine};
  }

  // Scores of one tile for every user, and what may still win into the user's buffer.
  void select(int64_t row, int64_t count, const float* dots, int64_t stride) {
    const float* bias = nullptr;
    if (request_.bias.data) {
      load_bias(row, count);
      bias = work_.bias.data();
    }
    const uint32_t rows_present = (1u << count) - 1;
    const auto prune = request_.reduce == Reduce::kLogSumExp ? kernels_.prune_log_sum_exp : kernels_.prune_max;
    float scores[kLanes];
    for (int64_t user = 0; user < group_.users; ++user) {
      const int64_t first = group_.packed.start[user], queries = group_.packed.start[user + 1] - first;
      if (!queries) continue;
      TopKBuffer& buffer = group_.buffer(slot_, user);
      uint32_t survivors =
          rows_present & prune(dots + first * stride, stride, queries, bias, buffer.threshold(), scores);
      for (; survivors; survivors &= survivors - 1) {
        const int i = __builtin_ctz(survivors);
        const uint64_t key = pack_key(scores[i], static_cast<uint32_t>(row + i));
        if (key >= buffer.floor() && request_.filter.allows(group_.first_user + user, row + i)) buffer.push(key);
      }
    }
  }

  void load_bias(int64_t row, int64_t count) {
    MatrixView part = request_.bias;
    part.data = static_cast<const char*>(part.data) + row * part.column_stride * element_bytes(part.dtype);
    part.columns = count;
    kernels_.widen(part, kLanes, work_.bias.data());
  }

  void adopt_floors() {
    for (int64_t user = 0; user < group_.users; ++user)
      group_.buffer(slot_, user).raise_floor(group_.floors[user].load(std::memory_order_relaxed));
  }

  void publish_floors() {
    for (int64_t user = 0; user < group_.users; ++user)
      raise_shared_floor(group_.floors[user], group_.buffer(slot_, user).floor());
  }

  Group& group_;
  const ScanRequest& request_;
  const Kernels& kernels_;
  Workspace& work_;
  const int slot_;
};

// The threads' buffers of one user, merged, cut to k and written out.
void write_user(Group& group, int64_t user) {
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
}

int useful_threads(const ScanRequest& request, int64_t queries, int64_t padded) {
  if (request.all_threads) return request.threads;
  const double work = static_cast<double>(request.items.rows) * padded * std::max<int64_t>(queries, 4);
  return static_cast<int>(std::clamp<double>(work / kWorkPerThread, 1, std::max(request.threads, 1)));
}

// False when interrupted.
bool scan_group(const ScanRequest& request, int64_t first, int64_t last, int64_t padded) {
  const int64_t n = request.items.rows, users = last - first;
  Group group{request, first, users, padded, pack_queries(request.queries, request.reduce, first, last, padded)};
  const int64_t queries = group.packed.total;
  if (queries > kDirectQueries) {
    group.panel.resize(query_panel_floats(queries, padded));
    pack_query_panel(group.packed.rows.data(), queries, padded, group.panel.data());
  }
  group.threads = useful_threads(request, queries, padded);
  const int64_t wide = request.kernels->panel_rows;
  const int64_t share = group.threads == 1 ? n : n / (8 * group.threads);
  group.chunk_rows = round_up(std::clamp<int64_t>(share, 1, kChunkRows), wide);
  group.capacity = topk_buffer_capacity(std::min(request.k, n), n);
  group.keys.resize(users * group.threads * group.capacity);
  group.floors = AlignedVector<std::atomic<uint64_t>>(users);
  for (auto& floor : group.floors) floor.store(kNoKey, std::memory_order_relaxed);
  std::vector<Workspace> work;
  work.reserve(group.threads);
  for (int slot = 0; slot < group.threads; ++slot) {
    work.emplace_back(group, request.kernels->panel_rows);
    for (int64_t user = 0; user < users; ++user)
      group.buffers.emplace_back(group.keys.data() + (user * group.threads + slot) * group.capacity,
                                 std::min(request.k, n), group.capacity);
  }
  if (queries && n && request.k) run_parallel(group.threads, [&](int slot) { Scanner(group, work[slot], slot).run(); });
  if (group.stop.load()) return false;
  std::atomic<int64_t> next_user{0};
  run_parallel(static_cast<int>(std::min<int64_t>(group.threads, users)), [&](int) {
    for (int64_t user; (user = next_user.fetch_add(1)) < users;) write_user(group, user);
  });
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
    if (!scan_group(request, first, std::min(queries.users, first + users), padded)) return false;
  return true;
}

}  // namespace urm
