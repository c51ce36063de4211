#include "workspace.h"

#include <algorithm>
#include <cstring>

namespace urm {
namespace {

constexpr int64_t kCachedBytes = 1 << 20;  // a table that stays in the second-level cache gains nothing by prefetching

bool is_padded_fp32(const MatrixView& items, int64_t padded) {
  return items.dtype == DType::kFloat32 && items.column_stride == 1 && items.columns == padded;
}

// Calls replace(place in the overlay, lane) for those of the rows at [place, place + lanes) that have been replaced.
template <class F>
void each_replaced(const Group& group, int64_t place, int64_t lanes, F replace) {
  const Overlay& overlay = group.request.overlay;
  if (!group.permuted) return overlay.each(place, lanes, replace);
  for (int64_t lane = 0; lane < lanes && overlay.count; ++lane)
    if (const int64_t at = overlay.of(group.row_at(place + lane)); at >= 0) replace(at, lane);
}

// Elements of a vector, of the rows at [place, place + count); where it belongs to the table, those of replaced rows
// from the overlay.
const float* vector_of(const Group& group, const MatrixView& vector, const MatrixView& replacement, int64_t place,
                       int64_t count, float* out) {
  const auto widen = [&](const MatrixView& from, int64_t first, int64_t last, float* to) {
    if (first < last) group.request.kernels->widen(part_of(from, first, last - first), last - first, to);
  };
  const auto copy = [&](int64_t first, int64_t last, float* to) {
    if (!group.permuted) return widen(vector, first, last, to);
    for (; first < last; ++first, ++to) {
      const int64_t row = group.row_at(first);
      widen(vector, row, row + 1, to);
    }
  };
  int64_t done = place;
  if (replacement.data)
    each_replaced(group, place, count, [&](int64_t at, int64_t lane) {
      copy(done, place + lane, out + (done - place));
      widen(replacement, at, at + 1, out + lane);
      done = place + lane + 1;
    });
  copy(done, place + count, out + (done - place));
  std::fill(out + count, out + round_up(count, kLanes), 0.0f);
  return out;
}

// Rows of a permuted table lie apart, where the processor does not foresee them.
void fetch_rows(const Group& group, int64_t place, int64_t count) {
  const MatrixView& items = group.request.items;
  if (items.column_stride != 1) return;
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  for (const int64_t end = std::min(place + count, group.places()); place < end; ++place) {
    const char* row = row_address(items, group.row_at(place));
    for (int64_t byte = 0; byte < row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte, 0, 2);
  }
}

// 16 bfloat16 rows as they lie, or a copy where they lie apart or some have been replaced.
const void* bfloat16_tile_of(const Group& group, Workspace& work, int64_t place, int64_t* stride_bytes) {
  const MatrixView& items = group.request.items;
  const Overlay& overlay = group.request.overlay;
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  const char* from[kLanes] = {};
  bool replaced = false;
  each_replaced(group, place, kLanes, [&](int64_t at, int64_t lane) {
    from[lane] = row_address(overlay.items, at);
    replaced = true;
  });
  *stride_bytes = items.row_stride * element_bytes(items.dtype);
  if (!replaced && !group.permuted) return row_address(items, place);
  if (group.permuted) fetch_rows(group, place + kLanes, kLanes);
  *stride_bytes = row_bytes;
  for (int64_t i = 0; i < kLanes; ++i)
    std::memcpy(work.cheap_rows.data() + i * row_bytes, from[i] ? from[i] : row_address(items, group.row_at(place + i)),
                row_bytes);
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
    if (group.request.codes.cells.count) wanted.resize(group.users), next_wanted.resize(group.users);
  }
  row_scale.resize(bias.size());
  row.resize(group.padded);
  user_dots.resize(group.packed.total);
  chosen.resize(kRescoreBatch * std::max<int64_t>(1, coded ? row_bounds.size() : group.packed.total));
  if (!cheap) return;
  if (group.bounds.rows == DType::kBFloat16 && (group.request.overlay.count || group.permuted))
    cheap_rows.resize(kLanes * group.request.items.columns * element_bytes(DType::kBFloat16));
  cheap_panel.resize(cheap->panel_bytes(group.padded));
  cheap_dots.resize(group.bounds.widest * cheap->panel_rows);
  scales.resize(cheap->panel_rows);
  lengths.resize(cheap->panel_rows);
}

const float* tile_of(const Group& group, Workspace& work, int64_t place, int64_t count, int64_t* stride) {
  const MatrixView& items = group.request.items;
  const Kernels& kernels = *group.request.kernels;
  const Overlay& overlay = group.request.overlay;
  float* rows = work.rows.data();
  *stride = group.padded;
  int64_t present[kLanes];
  bool apart = group.permuted;
  if (apart)
    for (int64_t i = 0; i < count; ++i) present[i] = group.row_at(place + i);
  each_replaced(group, place, count, [&](int64_t, int64_t lane) {
    if (!apart)
      for (int64_t i = 0; i < count; ++i) present[i] = place + i;
    present[lane] = -1;
    apart = true;
  });
  if (apart) {
    if (group.permuted) fetch_rows(group, place + count, kLanes);
    kernels.gather(items, present, count, group.padded, rows);
    each_replaced(group, place, count, [&](int64_t at, int64_t lane) {
      kernels.widen(row_view(overlay.items, at), group.padded, rows + lane * group.padded);
    });
    return rows;
  }
  if (is_padded_fp32(items, group.padded) && count == kLanes) {
    *stride = items.row_stride;
    return reinterpret_cast<const float*>(row_address(items, place));
  }
  kernels.stage(items, place, count, group.padded, rows);
  return rows;
}

const float* row_of(const Group& group, Workspace& work, int64_t place) {
  int64_t row = group.row_at(place);
  const int64_t replaced = group.request.overlay.of(row);
  const MatrixView& items = replaced < 0 ? group.request.items : group.request.overlay.items;
  if (replaced >= 0) row = replaced;
  if (is_padded_fp32(items, group.padded)) return reinterpret_cast<const float*>(row_address(items, row));
  group.request.kernels->widen(row_view(items, row), group.padded, work.row.data());
  return work.row.data();
}

void stage_cheap(const Group& group, Workspace& work, int64_t place, int64_t column) {
  const MatrixView& items = group.request.items;
  const CheapScore& cheap = *group.bounds.score;
  const void* rows;
  int64_t stride_bytes;
  if (group.bounds.rows == DType::kFloat32) {
    int64_t stride;
    rows = tile_of(group, work, place, kLanes, &stride);
    stride_bytes = stride * static_cast<int64_t>(sizeof(float));
  } else {
    rows = bfloat16_tile_of(group, work, place, &stride_bytes);
  }
  cheap.stage(rows, group.bounds.rows, stride_bytes, group.padded, static_cast<int>(column),
              memory_of(group, place + cheap.panel_rows, kLanes), work.cheap_panel.data(), work.scales.data() + column,
              work.lengths.data() + column);
}

const float* bias_of(const Group& group, Workspace& work, int64_t place, int64_t count) {
  const Codes& codes = group.request.codes;
  // The table's own copy, in this order.
  if (group.permuted && codes.bias && group.replaced.empty() && place + count <= codes.rows()) {
    std::copy(codes.bias + place, codes.bias + place + count, work.bias.data());
    std::fill(work.bias.data() + count, work.bias.data() + round_up(count, kLanes), 0.0f);
    return work.bias.data();
  }
  return vector_of(group, group.request.bias, group.request.overlay.bias, place, count, work.bias.data());
}

const float* row_scale_of(const Group& group, Workspace& work, int64_t place, int64_t count) {
  return vector_of(group, group.request.row_scale, group.request.overlay.row_scale, place, count,
                   work.row_scale.data());
}

Ahead memory_of(const Group& group, int64_t row, int64_t count) {
  const MatrixView& items = group.request.items;
  if (group.permuted || items.column_stride != 1 || items.row_stride != items.columns || row + count > items.rows)
    return {nullptr, 0};
  const int64_t row_bytes = items.columns * element_bytes(items.dtype);
  if (items.rows * row_bytes <= kCachedBytes) return {nullptr, 0};
  return {row_address(items, row), count * row_bytes / kCacheLine};
}

}  // namespace urm
