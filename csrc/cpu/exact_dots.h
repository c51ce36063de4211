// Exact dots of consecutive rows with all queries of a group, sixteen rows at a time.
#pragma once

#include <algorithm>

#include "group.h"
#include "workspace.h"

namespace urm {

// Calls use(place, count, dots, stride) for the tiles of places [begin, end): dots[q * stride + i] is that of query q
// and the row at place + i, times the row's scale.
template <class Use>
void exact_dots(const Group& group, Workspace& work, int64_t begin, int64_t end, Use use) {
  const ScanRequest& request = group.request;
  const Kernels& kernels = *request.kernels;
  float* dots = work.dots.data();
  const int64_t wide = group.direct() ? kLanes : kernels.panel_rows;
  for (int64_t row = begin; row < end; row += wide) {
    const Ahead ahead = memory_of(group, row + wide, wide);
    int64_t stride;
    if (group.direct()) {
      const float* rows = tile_of(group, work, row, std::min<int64_t>(kLanes, end - row), &stride);
      kernels.dots_of_rows(rows, stride, group.packed.rows.data(), group.packed.total, group.padded, ahead, dots);
    } else {
      for (int64_t column = 0; column < wide; column += kLanes) {
        const int64_t count = std::clamp<int64_t>(end - row - column, 0, kLanes);
        const float* rows = tile_of(group, work, row + column, count, &stride);
        kernels.transpose(rows, stride, group.padded, static_cast<int>(column), work.panel.data());
      }
      kernels.dots_of_panel(work.panel.data(), group.panel.data(), group.packed.total, group.padded, ahead, dots);
    }
    for (int64_t column = 0; column < wide && row + column < end; column += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - row - column);
      if (request.row_scale.data)
        kernels.scale_dots(row_scale_of(group, work, row + column, count), group.packed.total, wide, dots + column);
      use(row + column, count, dots + column, wide);
    }
  }
}

}  // namespace urm
