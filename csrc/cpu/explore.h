// A walk through a graph of neighbouring rows that looks for the best ones: some rows are scored, good ones are drawn,
// their neighbours are scored, and so on.
#pragma once

#include <cstdint>
#include <vector>

#include "scan.h"

namespace urm {

struct ExploreRequest : ScanRequest {
  const void* neighbors = nullptr;  // [rows, degree] rows; others, -1 for one, are none
  bool wide = false;                // int64 instead of int32
  int64_t degree = 0;
  int64_t first = 0;            // rows of the first round
  std::vector<int64_t> widths;  // rows whose neighbours each further round takes
  float temperature = 1;
  uint64_t seed = 0;
  const int64_t* streams = nullptr;  // [users]
  int64_t k = 0;
  float* scores = nullptr;    // [users, k], pads -inf
  int64_t* ids = nullptr;     // [users, k], pads -1
  int64_t* scored = nullptr;  // [rounds, users]: rows that were scored
};

// False when `interrupted` said so; the outputs are then undefined. Throws std::bad_alloc.
bool explore_topk(const ExploreRequest& request);

}  // namespace urm
