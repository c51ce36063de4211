#include "workspace.h"

#include <algorithm>

namespace urm {
namespace {

constexpr int64_t kCachedBytes = 1 << 20;  // a table that stays in the second-level cache gains nothing by prefetching

bool is_padded_fp32(const MatrixView& items, int64_t padded) {
  return items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == padded;
}

}  // namespace

Workspace::Workspace(const Group& group) {
  const Kernels& kernels = *group.request.kernels;
  const CheapScore* cheap = group.bounds.score;
  rows.resize(kLanes * group.padded);
  if (!group.direct()) panel.resize(kernels.panel_rows * group.padded);
  dots.resize(round_up(group.packed.total, kQueryGroup) * kernels.panel_rows);
  bias.resize(std::max(kernels.panel_rows, cheap ? cheap->panel_rows : 0));
  if (!cheap) return;
  cheap_panel.resize(cheap->panel_bytes(group.padded));
  cheap_dots.resize(group.bounds.widest * cheap->panel_rows);
  scales.resize(cheap->panel_rows);
  lengths.resize(cheap->panel_rows);
  row.resize(group.padded);
  user_dots.resize(group.packed.total);
}

const float* tile_of(const Group& group, Workspace& work, int64_t row, int64_t count, int64_t* stride) {
  const MatrixView& items = group.request.items;
  if (is_padded_fp32(items, group.padded) && count == kLanes) {
    *stride = items.row_stride;
    return reinterpret_cast<const float*>(row_address(items, row));
  }
  group.request.kernels->stage(items, row, count, group.padded, work.rows.data());
  *stride = group.padded;
  return work.rows.data();
}

const float* row_of(const Group& group, Workspace& work, int64_t row) {
  const MatrixView& items = group.request.items;
  if (is_padded_fp32(items, group.padded)) return reinterpret_cast<const float*>(row_address(items, row));
  MatrixView one = items;
  one.data = row_address(items, row);
  one.rows = 1;
  group.request.kernels->widen(one, group.padded, work.row.data());
  return work.row.data();
}

void stage_cheap(const Group& group, Workspace& work, int64_t row, int64_t column) {
  const MatrixView& items = group.request.items;
  const CheapScore& cheap = *group.bounds.score;
  const void* rows = row_address(items, row);
  int64_t stride_bytes = items.row_stride * element_bytes(items.dtype);
  if (group.bounds.rows == DType::kFloat32) {
    int64_t stride;
    rows = tile_of(group, work, row, kLanes, &stride);
    stride_bytes = stride * static_cast<int64_t>(sizeof(float));
  }
  cheap.stage(rows, group.bounds.rows, stride_bytes, group.padded, static_cast<int>(column),
              memory_of(items, row + cheap.panel_rows, kLanes), work.cheap_panel.data(), work.scales.data() + column,
              work.lengths.data() + column);
}

const float* bias_of(const Group& group, Workspace& work, int64_t row, int64_t count) {
  MatrixView part = group.request.bias;
  part.data = static_cast<const char*>(part.data) + row * part.column_stride * element_bytes(part.dtype);
  part.columns = count;
  group.request.kernels->widen(part, round_up(count, kLanes), work.bias.data());
  return work.bias.data();
}

Ahead memory_of(const MatrixView& items, int64_t row, int64_t count) {
  if (items.column_stride != 1 || items.row_stride != items.columns || row + count > items.rows) return {nullptr, 0};
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  if (items.rows * row_bytes <= kCachedBytes) return {nullptr, 0};
  return {row_address(items, row), count * row_bytes / kCacheLine};
}

}  // namespace urm
