// One thread's walk over its share of the rows. `Results` says which scores are still of use and takes those that are.
#pragma once

#include "code_scanner.h"
#include "group.h"
#include "measured_pace.h"
#include "pace.h"
#include "workspace.h"

namespace urm {

template <class Results>
class Scanner {
 public:
  Scanner(Group& group, Workspace& work, Results& results, int slot)
      : group_(group),
        request_(group.request),
        kernels_(*group.request.kernels),
        work_(work),
        results_(results),
        slot_(slot),
        codes_(group, work, results, slot),
        code_pace_(group.request.few ? ScanMode::kBounded : group.request.scan, group.packed.total > kDoubtfulQueries),
        pace_(group.request.scan) {}

  void run();

 private:
  static constexpr int64_t kDoubtfulQueries = 64;  // above, products may decide the time and not bytes

  void scan_chunk(int64_t begin, int64_t end);
  int64_t scan_codes(int64_t begin, int64_t end);
  void scan_cells(int64_t begin, int64_t end);
  bool has_thresholds();
  bool admits(int64_t user, int64_t row);
  void expect(int64_t done);
  void scan_rows(int64_t begin, int64_t end);
  void scan_exact(int64_t begin, int64_t end);
  void scan_bounded(int64_t begin, int64_t end);

  void select(int64_t place, int64_t count, const float* dots, int64_t stride);
  void select_bounded(const Slice& slice, int64_t place, int64_t column);
  // What is known of one row: cheap scores of the user's queries, panel_rows apart, and its side of the bound.
  struct Bounded {
    const float* cheap;
    float scale, length;
  };
  bool rescore(int64_t user, int64_t place, const Bounded& bounded, float bias, float threshold, float* score);

  Group& group_;
  const ScanRequest& request_;
  const Kernels& kernels_;
  Workspace& work_;
  Results& results_;
  const int slot_;
  CodeScanner<Results> codes_;
  MeasuredPace code_pace_;
  Pace pace_;
  bool has_thresholds_ = false;
  ScanCounts counts_;
  int64_t rescored_ = 0;
};

}  // namespace urm
