// Exact top k over a plain table: every row is read once for all queries of a group of users.
#pragma once

#include <cstdint>
#include <functional>

#include "filter.h"
#include "kernels.h"
#include "queries.h"
#include "views.h"

namespace urm {

// How rows are scored; the result is the same.
enum class ScanMode {
  kAuto,     // bounded where that is expected to pay
  kExact,    // the canonical dot for every row
  kBounded,  // a cheap score for every row, the canonical dot for those that can still win
};

struct ScanRequest {
  QueriesView queries;
  MatrixView items;
  MatrixView bias;  // [1, items] or data == nullptr
  Reduce reduce = Reduce::kMax;
  Filter filter;
  int64_t k = 0;
  bool sorted = true;
  int threads = 1;
  ScanMode scan = ScanMode::kAuto;
  bool all_threads = false;  // even where the work does not pay for waking them
  const Kernels* kernels = nullptr;
  std::function<bool()> interrupted;  // asked now and then on the calling thread

  float* scores = nullptr;  // [users, k], pads -inf
  int64_t* ids = nullptr;   // [users, k], pads -1
};

// False when `interrupted` said so; the outputs are then undefined. Throws std::bad_alloc.
bool scan_topk(const ScanRequest& request);

}  // namespace urm
