#include "allowed_blocks.h"

#include <algorithm>
#include <atomic>

#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kRowsAtOnce = 1 << 12;
constexpr int64_t kPartsOfThread = 2;
constexpr int64_t kRowsAhead = 16;  // places lie apart

}  // namespace

AllowedBlocks::AllowedBlocks(const std::vector<AlignedVector<uint32_t>>& lists, const Codes& codes, int64_t first_user,
                             int threads)
    : first_user_(first_user), masks_(static_cast<int64_t>(lists.size())), words_((codes.count + 63) / 64) {
  found_.assign(masks_ * words_, uint64_t{0});
  const auto coded = static_cast<uint32_t>(codes.rows());
  for (int64_t mask = 0; mask < masks_; ++mask) {
    const AlignedVector<uint32_t>& list = lists[mask];
    const int64_t rows = std::lower_bound(list.begin(), list.end(), coded) - list.begin();
    const int64_t parts = (rows + kRowsAtOnce - 1) / kRowsAtOnce;
    uint64_t* words = found_.data() + mask * words_;
    std::atomic<int64_t> next{0}, count{0};
    run_parallel(static_cast<int>(std::clamp<int64_t>(parts / kPartsOfThread, 1, threads)), [&](int) {
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts;)
        for (int64_t i = part * kRowsAtOnce; i < std::min(rows, (part + 1) * kRowsAtOnce); ++i) {
          if (codes.order && i + kRowsAhead < rows) __builtin_prefetch(codes.order + list[i + kRowsAhead]);
          const int64_t row = list[i], block = (codes.order ? codes.place_of(row) : row) / kBlockRows;
          const uint64_t bit = uint64_t{1} << block % 64;
          if (!(__atomic_load_n(words + block / 64, __ATOMIC_RELAXED) & bit) &&
              !(__atomic_fetch_or(words + block / 64, bit, __ATOMIC_RELAXED) & bit))
            count.fetch_add(1, std::memory_order_relaxed);
        }
    });
    count_ += count.load();
  }
}

bool AllowedBlocks::any(int64_t first, int64_t count) const {
  for (int64_t user = first_user_; user < first_user_ + masks_; ++user)
    if (among(user, first, count)) return true;
  return false;
}

std::pair<int64_t, int64_t> AllowedBlocks::next_run(int64_t first, int64_t most) const {
  if (masks_ > 1) return {first, 0};
  for (int64_t word = first / 64; word < words_; ++word) {
    uint64_t bits = found_[word];
    if (word == first / 64) bits &= ~uint64_t{0} << first % 64;
    if (!bits) continue;
    const int from = __builtin_ctzll(bits);
    const uint64_t behind = ~(bits >> from);
    return {word * 64 + from, behind ? std::min<int64_t>(most, __builtin_ctzll(behind)) : most};
  }
  return {first, 0};
}

uint32_t AllowedBlocks::among(int64_t user, int64_t first, int64_t count) const {
  const uint64_t* words = found_.data() + (masks_ == 1 ? 0 : user - first_user_) * words_;
  const int64_t word = first / 64, bit = first % 64;
  uint64_t bits = words[word] >> bit;
  if (bit + count > 64) bits |= words[word + 1] << (64 - bit);
  return static_cast<uint32_t>(bits & ((uint64_t{1} << count) - 1));
}

}  // namespace urm
