// Scans under masks that allow few rows: of those rows by themselves, or of the blocks that hold one.
#pragma once

#include <vector>

#include "allowed_blocks.h"
#include "allowed_rows.h"
#include "scan.h"

namespace urm {

// What users [first, last) are given from, and how it is read; a list for each mask.
enum class Reading { kAll, kRows, kBlocks };
struct Allowed {
  Reading reading = Reading::kAll;
  std::vector<AlignedVector<uint32_t>> lists{};
};
Allowed allowed_of(const ScanRequest& request, int64_t first, int64_t last);

// Calls scan(request, first, last) for users [first, last) or, with less to read, for parts of them. False as soon as
// a call says so.
template <class Request, class Scan>
bool scan_allowed(const Request& request, int64_t first, int64_t last, Scan scan) {
  const Allowed allowed = allowed_of(request, first, last);
  if (allowed.reading == Reading::kAll) return scan(request, first, last);
  Request part = request;
  part.few = true;
  if (allowed.reading == Reading::kBlocks) {
    const AllowedBlocks blocks(allowed.lists, request.codes, first, request.threads);
    part.blocks = &blocks;
    return scan(part, first, last);
  }
  part.codes = {};
  part.filter.kind = MaskKind::kNone;  // the lists say as much
  part.filter.alive = nullptr;
  for (int64_t i = 0; i < static_cast<int64_t>(allowed.lists.size()); ++i) {
    part.listed = &allowed.lists[i];
    if (!(allowed.lists.size() == 1 ? scan(part, first, last) : scan(part, first + i, first + i + 1))) return false;
  }
  return true;
}

}  // namespace urm
