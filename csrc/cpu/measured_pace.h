// Whether a thread scans its next stretch by codes or row by row, decided by its own time where that is in doubt.
#pragma once

#include <time.h>

#include <algorithm>
#include <cstdint>

#include "scan.h"

namespace urm {

// Codes read few bytes, but every pair that they cannot rule out costs as much as several scored in passing, and where
// many queries share a row the bytes hardly count. So where many pairs survive, or there are many queries, a few
// stretches are scanned both ways, and the faster way goes on, for twice as long each time that it wins again. The
// result is the same either way.
class MeasuredPace {
 public:
  MeasuredPace(ScanMode mode, bool doubtful) : always_(mode == ScanMode::kBounded), doubtful_(doubtful) {}

  bool by_codes() const { return always_ || state_ == State::kCodes || state_ == State::kTryCodes; }

  // Of the last stretch, `survivors` of `pairs` (row, user) survived. `settle` does what has been put off.
  template <class Settle>
  void judge(int64_t survivors, int64_t pairs, Settle settle) {
    if (always_ || --left_ > 0) return;
    switch (state_) {
      case State::kCodes:
        if (!doubtful_ && survivors * kPairsPerSurvivor <= pairs) return;
        [[fallthrough]];
      case State::kRows:
        settle();
        return begin(State::kTryCodes);
      case State::kTryCodes:
        settle();
        by_codes_ = thread_time() - began_;
        return begin(State::kTryRows);
      case State::kTryRows:
        const State winner = by_codes_ <= thread_time() - began_ ? State::kCodes : State::kRows;
        run_ = winner == last_winner_ ? std::min(2 * run_, kLongestRun) : kShortestRun;
        state_ = last_winner_ = winner;
        left_ = run_;
    }
  }

 private:
  enum class State { kCodes, kRows, kTryCodes, kTryRows };
  static constexpr int64_t kPairsPerSurvivor = 16;                             // fewer survivors are certainly worth it
  static constexpr int64_t kTrial = 4, kShortestRun = 32, kLongestRun = 1024;  // stretches

  void begin(State trial) {
    state_ = trial;
    left_ = kTrial;
    began_ = thread_time();
  }

  // Nanoseconds: not while another thread, a library's that still spins, say, has the processor.
  static int64_t thread_time() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
  }

  const bool always_, doubtful_;
  State state_ = State::kCodes, last_winner_ = State::kTryRows;
  int64_t left_ = 0, run_ = kShortestRun;
  int64_t began_ = 0, by_codes_ = 0;
};

}  // namespace urm
