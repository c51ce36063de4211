#include "workspace.h"

#include <algorithm>
#include <cstring>

namespace urm {
namespace {

constexpr int64_t kCachedBytes = 1 << 20;  // a table that stays in the second-level cache gains nothing by prefetching

bool is_padded_fp32(const MatrixView& items, int64_t padded) {
  return items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == padded;
}

// Elements [row, row + count) of a vector that belongs to the table, those of replaced rows from the overlay.
const float* vector_of(const Group& group, const MatrixView& vector, const MatrixView& replacement, int64_t row,
                       int64_t count, float* out) {
  const auto widen = [&](const MatrixView& from, int64_t first, int64_t last, float* to) {
    if (first < last) group.request.kernels->widen(part_of(from, first, last - first), last - first, to);
  };
  int64_t done = row;
  group.request.overlay.each(row, count, [&](int64_t place, int64_t lane) {
    widen(vector, done, row + lane, out + (done - row));
    widen(replacement, place, place + 1, out + lane);
    done = row + lane + 1;
  });
  widen(vector, done, row + count, out + (done - row));
  std::fill(out + count, out + round_up(count, kLanes), 0.0f);
  return out;
}

// 16 bfloat16 rows as they lie, or a copy where some have been replaced.
const void* bfloat16_tile_of(const Group& group, Workspace& work, int64_t row, int64_t* stride_bytes) {
  const MatrixView& items = group.request.items;
  const Overlay& overlay = group.request.overlay;
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  const char* from[kLanes] = {};
  bool replaced = false;
  overlay.each(row, kLanes, [&](int64_t place, int64_t lane) {
    from[lane] = row_address(overlay.items, place);
    replaced = true;
  });
  *stride_bytes = items.row_stride * element_bytes(items.dtype);
  if (!replaced) return row_address(items, row);
  *stride_bytes = row_bytes;
  for (int64_t i = 0; i < kLanes; ++i)
    std::memcpy(work.cheap_rows.data() + i * row_bytes, from[i] ? from[i] : row_address(items, row + i), row_bytes);
  return work.cheap_rows.data();
}

}  // namespace

Workspace::Workspace(const Group& group) {
  const Kernels& kernels = *group.request.kernels;
  const CheapScore* cheap = group.bounds.score;
  rows.resize(kLanes * group.padded);
  if (!group.direct()) panel.resize(kernels.panel_rows * group.padded);
  dots.resize(round_up(group.packed.total, kQueryGroup) * kernels.panel_rows);
  bias.resize(std::max(kernels.panel_rows, cheap ? cheap->panel_rows : 0));
  const bool coded = !group.query_codes.empty();
  if (coded) {
    bias.resize(std::max<int64_t>(bias.size(), kStretchBlocks * kBlockRows));
    largest_sums.resize(group.query_codes.most_groups * kStretchBlocks * kBlockRows);
    row_bounds.resize(group.query_codes.most_groups * kLanes);
    row_codes.resize(quads_of(group.request.items.columns) * kQuad);
    survivors.reserve(kSurvivors);
    waiting.reserve(kSurvivors);
  }
  row_scale.resize(bias.size());
  row.resize(group.padded);
  user_dots.resize(group.packed.total);
  chosen.resize(kRescoreBatch * std::max<int64_t>(1, coded ? row_bounds.size() : group.packed.total));
  if (!cheap) return;
  if (group.bounds.rows == DType::kBFloat16 && group.request.overlay.count)
    cheap_rows.resize(kLanes * group.request.items.columns * element_bytes(DType::kBFloat16));
  cheap_panel.resize(cheap->panel_bytes(group.padded));
  cheap_dots.resize(group.bounds.widest * cheap->panel_rows);
  scales.resize(cheap->panel_rows);
  lengths.resize(cheap->panel_rows);
}

const float* tile_of(const Group& group, Workspace& work, int64_t row, int64_t count, int64_t* stride) {
  const MatrixView& items = group.request.items;
  const Kernels& kernels = *group.request.kernels;
  const Overlay& overlay = group.request.overlay;
  float* rows = work.rows.data();
  *stride = group.padded;
  int64_t present[kLanes];
  bool replaced = false;
  overlay.each(row, count, [&](int64_t, int64_t lane) {
    if (!replaced)
      for (int64_t i = 0; i < count; ++i) present[i] = row + i;
    present[lane] = -1;
    replaced = true;
  });
  if (replaced) {
    kernels.gather(items, present, count, group.padded, rows);
    overlay.each(row, count, [&](int64_t place, int64_t lane) {
      kernels.widen(row_view(overlay.items, place), group.padded, rows + lane * group.padded);
    });
    return rows;
  }
  if (is_padded_fp32(items, group.padded) && count == kLanes) {
    *stride = items.row_stride;
    return reinterpret_cast<const float*>(row_address(items, row));
  }
  kernels.stage(items, row, count, group.padded, rows);
  return rows;
}

const float* row_of(const Group& group, Workspace& work, int64_t row) {
  const int64_t replaced = group.request.overlay.of(row);
  const MatrixView& items = replaced < 0 ? group.request.items : group.request.overlay.items;
  if (replaced >= 0) row = replaced;
  if (is_padded_fp32(items, group.padded)) return reinterpret_cast<const float*>(row_address(items, row));
  group.request.kernels->widen(row_view(items, row), group.padded, work.row.data());
  return work.row.data();
}

void stage_cheap(const Group& group, Workspace& work, int64_t row, int64_t column) {
  const MatrixView& items = group.request.items;
  const CheapScore& cheap = *group.bounds.score;
  const void* rows;
  int64_t stride_bytes;
  if (group.bounds.rows == DType::kFloat32) {
    int64_t stride;
    rows = tile_of(group, work, row, kLanes, &stride);
    stride_bytes = stride * static_cast<int64_t>(sizeof(float));
  } else {
    rows = bfloat16_tile_of(group, work, row, &stride_bytes);
  }
  cheap.stage(rows, group.bounds.rows, stride_bytes, group.padded, static_cast<int>(column),
              memory_of(items, row + cheap.panel_rows, kLanes), work.cheap_panel.data(), work.scales.data() + column,
              work.lengths.data() + column);
}

const float* bias_of(const Group& group, Workspace& work, int64_t row, int64_t count) {
  return vector_of(group, group.request.bias, group.request.overlay.bias, row, count, work.bias.data());
}

const float* row_scale_of(const Group& group, Workspace& work, int64_t row, int64_t count) {
  return vector_of(group, group.request.row_scale, group.request.overlay.row_scale, row, count, work.row_scale.data());
}

Ahead memory_of(const MatrixView& items, int64_t row, int64_t count) {
  if (items.column_stride != 1 || items.row_stride != items.columns || row + count > items.rows) return {nullptr, 0};
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  if (items.rows * row_bytes <= kCachedBytes) return {nullptr, 0};
  return {row_address(items, row), count * row_bytes / kCacheLine};
}

}  // namespace urm
