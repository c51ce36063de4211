// A scan of a table: every row, or its code, is read once for all queries of a group of users.
#pragma once

#include <cstdint>
#include <functional>

#include "aligned.h"
#include "filter.h"
#include "query_codes.h"
#include "request.h"

namespace urm {

class AllowedBlocks;

// How rows are scored; the result is the same.
enum class ScanMode {
  kAuto,     // bounded where that is expected to pay
  kExact,    // the canonical dot for every row
  kBounded,  // a cheap score for every row, the canonical dot for those that can still win
};

// What a scan did; added up.
struct ScanCounts {
  int64_t bytes = 0;      // read of codes and rows
  int64_t survivors = 0;  // (user, row) pairs that a bound from codes could not rule out
  int64_t scored = 0;     // pairs scored exactly
  int64_t cells = 0;      // (user, cell) pairs whose bounds were asked
  int64_t left_out = 0;   // and those of them that were not read

  ScanCounts& operator+=(const ScanCounts& more) {
    bytes += more.bytes, survivors += more.survivors, scored += more.scored;
    cells += more.cells, left_out += more.left_out;
    return *this;
  }
};

// What every scan is asked.
struct ScanRequest : Request {
  Codes codes;
  Filter filter;
  ScanMode scan = ScanMode::kAuto;
  bool all_threads = false;           // even where the work does not pay for waking them
  std::function<bool()> interrupted;  // asked now and then on the calling thread
  ScanCounts* counts = nullptr;       // added to, where given
  // Where masks allow few rows: these, ascending, for a scan without codes, or the blocks that hold one, and whether
  // what is left is too little for samples.
  const AlignedVector<uint32_t>* listed = nullptr;
  const AllowedBlocks* blocks = nullptr;
  bool few = false;

  // Of the table, or of the list.
  int64_t rows_met() const { return listed ? static_cast<int64_t>(listed->size()) : items.rows; }
};

// Exact top k.
struct TopKRequest : ScanRequest {
  int64_t k = 0;
  bool sorted = true;
  float* scores = nullptr;    // [users, k], pads -inf
  int64_t* ids = nullptr;     // [users, k], pads -1
  uint8_t* proven = nullptr;  // [users], where given: whether the result is certainly the exact one
};

// False when `interrupted` said so; the outputs are then undefined. Throws std::bad_alloc.
bool scan_topk(const TopKRequest& request);

// log(sum over allowed rows of exp(score / temperature)) of every user; rows whose score is NaN take no part.
struct PartitionRequest : ScanRequest {
  float temperature = 1;  // positive
  float* out = nullptr;   // [users], -inf where no row takes part
};

bool scan_partition(const PartitionRequest& request);

// A request for users [first, last) and every step-th row, scored exactly.
template <class Request>
Request sampled(const Request& request, int64_t first, int64_t last, int64_t step) {
  Request sample = request;
  sample.queries.data += first * request.queries.queries * request.queries.r;
  if (sample.queries.exists) sample.queries.exists += first * request.queries.queries;
  sample.queries.users = last - first;
  sample.items = every(request.items, step);
  sample.bias = every_column(request.bias, step);
  sample.row_scale = every_column(request.row_scale, step);
  sample.overlay = request.overlay.sampled(step);
  sample.filter = request.filter.sampled(first, step);
  sample.codes = {};
  sample.listed = nullptr, sample.blocks = nullptr;
  sample.scan = ScanMode::kExact;
  return sample;
}

}  // namespace urm
