#include "upper_bounds.h"

#include <algorithm>
#include <limits>

#include "cell_bounds.h"
#include "code_scanner.h"
#include "float_environment.h"
#include "run_scan.h"
#include "topk_results.h"
#include "workspace.h"

namespace urm {
namespace {

ScanRequest bounded(const QueriesView& queries, const MatrixView& items, const Codes& codes, const Kernels& kernels) {
  ScanRequest request;
  request.queries = queries;
  request.items = items;
  request.kernels = &kernels;
  request.codes = codes;
  request.scan = ScanMode::kBounded;
  return request;
}

}  // namespace

bool upper_bounds(const QueriesView& queries, const MatrixView& items, const Kernels& kernels, float* out) {
  const DefaultFloatEnvironment environment;
  const ScanRequest request = bounded(queries, items, {}, kernels);
  const int64_t padded = padded_columns(queries), n = items.rows;
  Group group(request, 0, queries.users, padded);
  if (!group.bounds.score) return false;
  const CheapScore& cheap = *group.bounds.score;
  Workspace work(group);
  const CheapSession session(&cheap);
  std::fill(out, out + group.packed.total * n, std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row + kLanes <= n; row += kLanes) {
    stage_cheap(group, work, row, 0);
    for (const Slice& slice : group.bounds.slices) {
      cheap.dots(work.cheap_panel.data(), group.bounds.queries.data() + slice.offset, slice.queries, padded,
                 work.cheap_dots.data());
      for (int64_t q = 0; q < slice.queries; ++q)
        for (int64_t i = 0; i < kLanes; ++i) {
          const float slack = group.bounds.slack[slice.first_query + q] * work.lengths[i];
          const float bound = work.scales[i] * (work.cheap_dots[q * cheap.panel_rows + i] + slack);
          if (work.lengths[i] - work.lengths[i] == 0.0f) out[(slice.first_query + q) * n + row + i] = bound;
        }
    }
  }
  return true;
}

bool code_bounds(const QueriesView& queries, const MatrixView& items, const Codes& codes, const Kernels& kernels,
                 bool of_queries, float* out) {
  const DefaultFloatEnvironment environment;
  const ScanRequest request = bounded(queries, items, codes, kernels);
  Group group(request, 0, queries.users, padded_columns(queries));
  if (group.query_codes.empty()) return false;
  Workspace work(group);
  TopKResults results(group, 1, 1);
  CodeScanner<TopKResults> scanner(group, work, results, 0);
  const int64_t outputs = of_queries ? group.packed.total : queries.users;
  std::fill(out, out + outputs * items.rows, std::numeric_limits<float>::infinity());
  AlignedVector<float> block(kBlockRows);
  for (int64_t user = 0; user < queries.users; ++user) {
    const int64_t first = group.packed.start[user], count = group.packed.start[user + 1] - first;
    for (int64_t place = 0; place < codes.rows() && count; ++place) {
      const int64_t row = group.row_at(place);
      if (!of_queries) {
        if (place % kBlockRows == 0) scanner.bounds_of_block(user, place / kBlockRows, block.data());
        out[user * items.rows + row] = block[place % kBlockRows];
        continue;
      }
      scanner.bounds_of_row(user, place, ~uint64_t{0}, work.row_bounds.data());
      for (int64_t m = 0; m < count; ++m) out[(first + m) * items.rows + row] = work.row_bounds[m];
    }
  }
  return true;
}

bool cell_bounds(const QueriesView& queries, const MatrixView& items, const Codes& codes, const Kernels& kernels,
                 float* out) {
  const DefaultFloatEnvironment environment;
  const ScanRequest request = bounded(queries, items, codes, kernels);
  Group group(request, 0, queries.users, padded_columns(queries));
  if (group.query_codes.empty()) return false;
  std::vector<Workspace> work = workspaces(group);
  const AlignedVector<float> bounds = bounds_of_cells(group, work);
  std::copy(bounds.begin(), bounds.end(), out);
  return true;
}

}  // namespace urm
