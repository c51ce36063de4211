// One thread's working memory, and how rows of the table get into it.
#pragma once

#include "group.h"

namespace urm {

constexpr int64_t kStretchBlocks = 8;  // of codes, scanned for one user after the other
constexpr int64_t kSurvivors = 512;    // that wait for their rows; when there are as many, all are rescored
constexpr int64_t kRescoreBatch = 16;  // whose rows are fetched before the first is used

// A pair that the scan of the codes could not rule out.
struct Survivor {
  int64_t place, user;
  float bound;
  uint64_t groups;  // of 16 of the user's queries, one of which may reach the threshold; the last bit is all beyond 63
};

// Allocated before the threads start.
struct Workspace {
  AlignedVector<float> rows, panel, dots, bias, row_scale;
  AlignedVector<char> cheap_panel{};
  AlignedVector<char> cheap_rows{};
  AlignedVector<float> cheap_dots{}, scales{}, lengths{}, row{}, user_dots{};
  AlignedVector<int32_t> chosen{};  // queries of a user whose dots are wanted
  AlignedVector<int32_t> largest_sums{};
  AlignedVector<float> row_bounds{};
  AlignedVector<uint8_t> row_codes{};
  AlignedVector<Survivor> survivors{}, waiting{};
  AlignedVector<uint32_t> wanted{}, next_wanted{};  // [users], blocks of a stretch; of tables with cells

  explicit Workspace(const Group& group);
};

// A cheap score's preparation of the thread, for the life of a scope.
class CheapSession {
 public:
  explicit CheapSession(const CheapScore* score) : score_(score) {
    if (score_ && score_->enter) score_->enter();
  }
  ~CheapSession() {
    if (score_ && score_->leave) score_->leave();
  }
  CheapSession(const CheapSession&) = delete;
  CheapSession& operator=(const CheapSession&) = delete;

 private:
  const CheapScore* score_;
};

// Up to 16 padded fp32 rows from a place on: the table itself where it has that form, else widened into the workspace.
const float* tile_of(const Group& group, Workspace& work, int64_t place, int64_t count, int64_t* stride);

// One row likewise.
const float* row_of(const Group& group, Workspace& work, int64_t place);

// 16 rows into columns [column, column + 16) of the cheap panel, with their scales and lengths.
void stage_cheap(const Group& group, Workspace& work, int64_t place, int64_t column);

const float* bias_of(const Group& group, Workspace& work, int64_t place, int64_t count);
const float* row_scale_of(const Group& group, Workspace& work, int64_t place, int64_t count);

// Where rows follow each other without a gap, the memory of `count` of them; nothing where the cache holds the table.
Ahead memory_of(const Group& group, int64_t row, int64_t count);

}  // namespace urm
