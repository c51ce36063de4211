// One thread's walk over its share of the rows.
#pragma once

#include "group.h"
#include "pace.h"

namespace urm {

// One thread's working memory, allocated before the threads start.
struct Workspace {
  AlignedVector<float> rows, panel, dots, bias;
  AlignedVector<char> cheap_panel{};
  AlignedVector<float> cheap_dots{}, lengths{}, row{}, user_dots{};

  explicit Workspace(const Group& group);
};

class Scanner {
 public:
  Scanner(Group& group, Workspace& work, int slot)
      : group_(group),
        request_(group.request),
        kernels_(*group.request.kernels),
        work_(work),
        slot_(slot),
        pace_(group.request.scan) {}

  void run();

 private:
  void scan(int64_t begin, int64_t end);
  void scan_exact(int64_t begin, int64_t end);
  void scan_rows(int64_t begin, int64_t end);
  void scan_panels(int64_t begin, int64_t end);
  void scan_bounded(int64_t begin, int64_t end);

  const float* tile(int64_t row, int64_t count, int64_t* stride);
  void stage_cheap(int64_t row, int64_t column);
  Ahead ahead(int64_t row, int64_t count) const;
  const float* load_bias(int64_t row, int64_t count);

  void select(int64_t row, int64_t count, const float* dots, int64_t stride);
  void select_bounded(const Slice& slice, int64_t row, int64_t column);
  bool rescore(int64_t user, int64_t row, const float* cheap, float length, float bias, float threshold, float* score);
  const float* whole_row(int64_t row);

  void adopt_floors();
  void publish_floors();

  Group& group_;
  const ScanRequest& request_;
  const Kernels& kernels_;
  Workspace& work_;
  const int slot_;
  Pace pace_;
  int64_t rescored_ = 0;
};

}  // namespace urm
