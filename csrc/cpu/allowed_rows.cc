#include "allowed_rows.h"

#include <algorithm>
#include <atomic>
#include <numeric>

#include "thread_pool.h"

namespace urm {
namespace {

constexpr int64_t kWord = 64;
constexpr int64_t kFewestWords = 1024;  // for which a thread is woken
constexpr int64_t kPartsOfThread = 8;
constexpr int64_t kAtOnce = 4;  // rows written, however few a word has: their number cannot be foreseen

// Lists one mask after another. Counts first, so that a list has the memory it needs and no more.
class Lister {
 public:
  Lister(const Filter& filter, int64_t rows, int threads)
      : filter_(filter),
        rows_(rows),
        words_((rows + kWord - 1) / kWord),
        threads_(static_cast<int>(std::clamp<int64_t>(words_ / kFewestWords, 1, threads))),
        parts_(threads_ == 1 ? 1 : threads_ * kPartsOfThread),
        first_(parts_ + 1) {}

  // False where there are more than `most`.
  bool list(int64_t user, int64_t most, AlignedVector<uint32_t>& out) {
    first_[0] = 0;
    each_part([&](int64_t part) {
      int64_t count = 0;
      for (int64_t word = begin(part); word < begin(part + 1); ++word)
        count += __builtin_popcountll(word_of(user, word));
      first_[part + 1] = count;
    });
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    if (first_[parts_] > most) return false;
    out.resize(first_[parts_]);
    each_part([&](int64_t part) {
      uint32_t *to = out.data() + first_[part], *const end = out.data() + first_[part + 1];
      for (int64_t word = begin(part); word < begin(part + 1) && to < end; ++word)
        to = write_rows(word_of(user, word), word * kWord, to, end);
      // Of a mask that was changed meanwhile: any rows, but such as there are, and still ascending.
      std::fill(to, end, to == out.data() + first_[part] ? static_cast<uint32_t>(begin(part) * kWord) : to[-1]);
    });
    return true;
  }

 private:
  int64_t begin(int64_t part) const { return part * words_ / parts_; }

  uint64_t word_of(int64_t user, int64_t word) const {
    return filter_.masked(user, word * kWord, std::min(kWord, rows_ - word * kWord));
  }

  template <class Use>
  void each_part(Use use) {
    std::atomic<int64_t> next{0};
    run_parallel(threads_, [&](int) {
      for (int64_t part; (part = next.fetch_add(1, std::memory_order_relaxed)) < parts_;) use(part);
    });
  }

  // The rows of a word, and up to kAtOnce - 1 more numbers where there is room, to be written over. Returns the end.
  static uint32_t* write_rows(uint64_t word, int64_t first, uint32_t* to, uint32_t* end) {
    constexpr uint64_t kLast = uint64_t{1} << 63;  // of no word it is asked where its first bit is
    uint32_t* const behind = to + __builtin_popcountll(word);
    const auto row = static_cast<uint32_t>(first);
    if (end - behind < kAtOnce) {
      for (; word && to < end; word &= word - 1) *to++ = row + static_cast<uint32_t>(__builtin_ctzll(word));
      return to;
    }
    do {
      for (int i = 0; i < kAtOnce; ++i, word &= word - 1)
        *to++ = row + static_cast<uint32_t>(__builtin_ctzll(word | kLast));
    } while (word);
    return behind;
  }

  const Filter& filter_;
  const int64_t rows_, words_;
  const int threads_;
  const int64_t parts_;
  AlignedVector<int64_t> first_;  // [parts + 1], of each part's rows in the list
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
