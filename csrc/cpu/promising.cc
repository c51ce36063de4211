#include "promising.h"

#include "allowed_blocks.h"

namespace urm {
namespace {

constexpr int64_t kBlocksOfTask = 2048;  // of all, few of which are read
constexpr int64_t kRowsOfResult = 16;    // fewer, and most of them are scored anyway

struct Run {
  int64_t first = 0, count = 0;
};

// Runs of a user's blocks among [begin, end): use(run, the one behind it, or an empty one).
template <class Use>
void each_run(const Group& group, int64_t user, int64_t begin, int64_t end, Use use) {
  Run last;
  for (int64_t block = begin; block < end; block += kStretchBlocks) {
    uint32_t some = group.allowed_blocks(user, block, 1, std::min(kStretchBlocks, end - block));
    while (some) {
      const int from = __builtin_ctz(some), run = __builtin_ctz(~(some >> from));
      some &= ~(((1u << run) - 1) << from);
      const Run next{block + from, run};
      if (last.count) use(last, next);
      last = next;
    }
  }
  if (last.count) use(last, Run{});
}

}  // namespace

void use_few_blocks(const TopKRequest& request, Group& group, std::vector<Workspace>& work, TopKResults& results) {
  if (!request.blocks || group.query_codes.empty() || !request.k) return;
  const int64_t blocks = request.codes.count, k = std::min(request.k, request.items.rows);
  if (request.blocks->count() * kBlockRows < kRowsOfResult * k) return;
  const int64_t parts = (blocks + kBlocksOfTask - 1) / kBlocksOfTask;
  const int threads = group.threads_for(kPassCost * multiply_adds(group, request.blocks->count() * kBlockRows));
  TopKResults found(group, k, topk_buffer_capacity(k, request.items.rows));
  score_most_promising(group, work, k, threads, parts, found, [&](int64_t user, int64_t part, auto& scanner) {
    if (group.packed.start[user + 1] == group.packed.start[user]) return;
    const int64_t begin = part * kBlocksOfTask;
    each_run(group, user, begin, std::min(blocks, begin + kBlocksOfTask), [&](const Run& run, const Run& next) {
      if (group.next_replaced(run.first * kBlockRows) < (run.first + run.count) * kBlockRows) return;
      scanner.take_bounds(user, run.first, run.count, scanner.memory_of(next.first, next.count));
    });
  });
  for (int64_t user = 0; user < group.users; ++user) results.raise_floor(user, found.best(user).floor());
}

}  // namespace urm
