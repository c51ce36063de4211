#include "allowed_rows.h"

#include <algorithm>
#include <atomic>

#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kFewestWords = 1024;  // for which a thread is woken
constexpr int64_t kPartsOfThread = 8;
constexpr int64_t kAskedAfter = 64;  // words, whether there are too many
constexpr int64_t kAtOnce = 4;       // rows written, however few a word has: their number cannot be foreseen

// Lists one mask after another, in the same memory.
class Lister {
 public:
  Lister(const Filter& filter, int64_t rows, int threads)
      : filter_(filter),
        rows_(rows),
        words_((rows + kWord - 1) / kWord),
        threads_(static_cast<int>(std::clamp<int64_t>(words_ / kFewestWords, 1, threads))),
        parts_(threads_ == 1 ? 1 : threads_ * kPartsOfThread),
        counts_(parts_),
        found_(rows + parts_ * kAtOnce) {}

  // False where there are more than `most`.
  bool list(int64_t user, int64_t most, AlignedVector<uint32_t>& out) {
    std::atomic<int64_t> next{0}, allowed{0};
    run_parallel(threads_, [&](int) {
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts_;)
        counts_[part] = list_part(user, begin(part), begin(part + 1), most, allowed, list_of(part));
    });
    if (allowed.load() > most) return false;
    out.resize(allowed.load());
    auto* to = out.data();
    for (int64_t part = 0; part < parts_; ++part) {
      const uint32_t* from = list_of(part);
      to = std::copy(from, from + counts_[part], to);
    }
    return true;
  }

 private:
  int64_t begin(int64_t part) const { return part * words_ / parts_; }
  uint32_t* list_of(int64_t part) { return found_.data() + begin(part) * kWord + part * kAtOnce; }

  // Rows of words [word, end).
  int64_t list_part(int64_t user, int64_t word, int64_t end, int64_t most, std::atomic<int64_t>& allowed,
                    uint32_t* list) {
    int64_t count = 0;
    while (word < end && allowed.load(std::memory_order_relaxed) <= most) {
      const int64_t before = count;
      for (const int64_t stop = std::min(end, word + kAskedAfter); word < stop; ++word)
        count += rows_of(filter_.masked(user, word * kWord, std::min(kWord, rows_ - word * kWord)),
                         static_cast<uint32_t>(word * kWord), list + count);
      allowed.fetch_add(count - before, std::memory_order_relaxed);
    }
    return count;
  }

  // Writes the rows that a word has, and up to kAtOnce - 1 more numbers; returns how many there are.
  static int64_t rows_of(uint64_t word, uint32_t first, uint32_t* list) {
    constexpr uint64_t kLast = uint64_t{1} << 63;  // of no word it is asked where its first bit is
    uint64_t left = word;
    do {
      for (int i = 0; i < kAtOnce; ++i, left &= left - 1)
        *list++ = first + static_cast<uint32_t>(__builtin_ctzll(left | kLast));
    } while (left);
    return __builtin_popcountll(word);
  }

  const Filter& filter_;
  const int64_t rows_, words_;
  const int threads_;
  const int64_t parts_;
  AlignedVector<int64_t> counts_;  // [parts]
  AlignedVector<uint32_t> found_;  // [rows], and room beside; each part fills the beginning of its own
};

}  // namespace

std::vector<AlignedVector<uint32_t>> few_allowed(const Filter& filter, int64_t rows, int64_t first, int64_t last,
                                                 int64_t most, int threads) {
  std::vector<AlignedVector<uint32_t>> lists(filter.mask_user_stride ? last - first : 1);
  Lister lister(filter, rows, threads);
  for (std::size_t i = 0; i < lists.size(); ++i) {
    if (!lister.list(first + static_cast<int64_t>(i), most, lists[i])) return {};
    most -= static_cast<int64_t>(lists[i].size());
  }
  return lists;
}

}  // namespace urm
