#include "allowed_blocks.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kMostDense = 16;  // rows a row that a mask allows: with more of these, few blocks have none
constexpr int64_t kRowsAtOnce = 1 << 16;

// Calls use(row) for the rows of [begin, end) that the masks allow to a user; begin is a multiple of 64.
template <class Use>
void each_allowed(const Filter& filter, int64_t user, int64_t begin, int64_t end, Use use) {
  for (int64_t row = begin; row < end; row += 64) {
    const int64_t count = std::min<int64_t>(64, end - row);
    uint64_t bits = filter.masked(user, row, count);
    for (; bits; bits &= bits - 1) use(row + __builtin_ctzll(bits));
  }
}

}  // namespace

AllowedBlocks::AllowedBlocks(const Filter& filter, const Codes& codes, int64_t rows, int64_t first_user,
                             int64_t last_user, int threads)
    : first_user_(first_user), permuted_(codes.order) {
  if (filter.kind == MaskKind::kNone && !filter.alive) return;
  filter_ = &filter;
  if (!permuted_) return;
  const int64_t masks = filter.mask_user_stride ? last_user - first_user : 1;
  user_stride_ = filter.mask_user_stride ? 1 : 0;
  words_ = (codes.count + 63) / 64;
  const int64_t coded = std::min(rows, codes.rows()), parts = (coded + kRowsAtOnce - 1) / kRowsAtOnce;
  is_found_.assign(masks, uint8_t{0});
  for (int64_t mask = 0; mask < masks; ++mask) {
    std::atomic<int64_t> allowed{0}, next{0};
    const auto each_part = [&](auto use) {
      next = 0;
      run_parallel(static_cast<int>(std::min<int64_t>(threads, parts)), [&](int) {
        for (int64_t part; (part = next.fetch_add(1)) < parts;)
          use(part * kRowsAtOnce, std::min(coded, (part + 1) * kRowsAtOnce));
      });
    };
    each_part([&](int64_t begin, int64_t end) {
      if (allowed.load(std::memory_order_relaxed) * kMostDense > coded) return;
      int64_t count = 0;
      for (int64_t row = begin; row < end; row += 64)
        count += __builtin_popcountll(filter.masked(first_user + mask, row, std::min<int64_t>(64, end - row)));
      allowed.fetch_add(count, std::memory_order_relaxed);
    });
    if (allowed.load() * kMostDense > coded) continue;
    if (found_.empty()) found_.assign(masks * words_, uint64_t{0});
    uint64_t* words = found_.data() + mask * words_;
    each_part([&](int64_t begin, int64_t end) {
      each_allowed(filter, first_user + mask, begin, end, [&](int64_t row) {
        const int64_t block = codes.place_of(row) / kBlockRows;
        const uint64_t bit = uint64_t{1} << block % 64;
        if (!(__atomic_load_n(words + block / 64, __ATOMIC_RELAXED) & bit))
          __atomic_fetch_or(words + block / 64, bit, __ATOMIC_RELAXED);
      });
    });
    is_found_[mask] = 1;
  }
}

uint32_t AllowedBlocks::among(int64_t user, int64_t first, int64_t step, int64_t count) const {
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if (!filter_) return all;
  uint32_t some = 0;
  if (!permuted_) {
    for (int64_t i = 0; i < count; ++i)
      if (filter_->masked(first_user_ + user, (first + i * step) * kBlockRows, kBlockRows)) some |= 1u << i;
    return some;
  }
  const int64_t mask = user * user_stride_;
  if (!is_found_[mask]) return all;
  const uint64_t* words = found_.data() + mask * words_;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = first + i * step;
    some |= static_cast<uint32_t>(words[block / 64] >> block % 64 & 1) << i;
  }
  return some;
}

}  // namespace urm
