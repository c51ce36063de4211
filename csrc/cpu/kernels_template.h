// The innermost loops, written once over a vector type V of 16 floats that each instruction set provides.
// Included by kernels_*.cc only, inside an anonymous namespace: nothing here may be an inline symbol that the linker
// could share between files compiled for different instruction sets, so no standard-library templates either.
#pragma once

#include "kernels_codes.h"
#include "kernels_partition.h"

template <class V>
struct KernelsOf {
  static constexpr int kPanelRows = V::kPanelBlocks * kLanes;

  static void widen_row(const MatrixView& items, const char* row, float* out) {
    const int64_t r = items.columns;
    if (items.column_stride == 1) {
      int64_t e = 0;
      for (; e + kLanes <= r; e += kLanes) V::widen(row, items.dtype, e).store(out + e);
      for (; e < r; ++e) out[e] = V::widen_one(row, items.dtype, e);
    } else {
      for (int64_t e = 0; e < r; ++e) out[e] = V::widen_one(row, items.dtype, e * items.column_stride);
    }
  }

  static void zero(float* out, int64_t from, int64_t to) {
    for (int64_t e = from; e < to; ++e) out[e] = 0.0f;
  }

  static void stage(const MatrixView& items, int64_t row, int64_t count, int64_t padded, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      widen_row(items, row_address(items, row + i), out + i * padded);
      zero(out + i * padded, items.columns, padded);
    }
    zero(out, count * padded, kLanes * padded);
  }

  static void widen(const MatrixView& row, int64_t padded, float* out) {
    widen_row(row, row_address(row, 0), out);
    zero(out, row.columns, padded);
  }

  static void gather(const MatrixView& items, const int64_t* rows, int64_t count, int64_t padded, float* out) {
    for (int64_t i = 0; i < count; ++i) {
      if (rows[i] >= 0) widen_row(items, row_address(items, rows[i]), out + i * padded);
      zero(out + i * padded, rows[i] >= 0 ? items.columns : 0, padded);
    }
    zero(out, count * padded, kLanes * padded);
  }

  static constexpr int kIntoSecondLevel = 2;  // keeps no line-fill buffer, so that the arithmetic's own loads go on

  // The share of `ahead` that falls to step `step` of `steps`. Always inlined: GCC 12 takes a function that only
  // prefetches for one without effect and drops calls of it.
  __attribute__((always_inline)) static inline void fetch(Ahead ahead, int64_t step, int64_t steps) {
    const int64_t end = ahead.lines * (step + 1) / steps;
    for (int64_t line = ahead.lines * step / steps; line < end; ++line)
      __builtin_prefetch(ahead.address + line * kCacheLine, 0, kIntoSecondLevel);
  }

  static void transpose(const float* rows, int64_t stride, int64_t padded, int column, float* panel) {
    const int64_t steps = padded / kLanes;
    for (int64_t t = 0; t < steps; ++t) {
      V lane[kLanes];
      for (int i = 0; i < kLanes; ++i) lane[i] = V::load(rows + i * stride + t * kLanes);
      V::transpose(lane);
      for (int p = 0; p < kLanes; ++p) lane[kTreeOrder[p]].store(panel + (p * steps + t) * kPanelRows + column);
    }
  }

  // `Padded` and `stride` known to the compiler (0: not) turn 16 row pointers into one and an immediate offset.
  template <int Padded>
  static void dots_of_rows_sized(const float* rows, int64_t stride, const float* queries, int64_t count, int64_t padded,
                                 Ahead ahead, float* out) {
    if (Padded) stride = padded = Padded;
    for (int64_t q = 0; q < count; ++q, queries += padded, out += kLanes) {
      fetch(ahead, q, count);
      V sums[kLanes];
#pragma GCC unroll 16
      for (int first = 0; first < kLanes; first += V::kRowsAtOnce) {
        V acc[V::kRowsAtOnce];
#pragma GCC unroll 16
        for (int i = 0; i < V::kRowsAtOnce; ++i) acc[i] = V::zero();
#pragma GCC unroll 8
        for (int64_t e = 0; e < padded; e += kLanes) {
          const V y = V::load(queries + e);
#pragma GCC unroll 16
          for (int i = 0; i < V::kRowsAtOnce; ++i) acc[i] = V::fma(V::load(rows + (first + i) * stride + e), y, acc[i]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < V::kRowsAtOnce; ++i) sums[first + i] = acc[i];
      }
      V::tree(sums).store(out);
    }
  }

  static void dots_of_rows(const float* rows, int64_t stride, const float* queries, int64_t count, int64_t padded,
                           Ahead ahead, float* out) {
    if (stride != padded) dots_of_rows_sized<0>(rows, stride, queries, count, padded, ahead, out);
    else if (padded == 64) dots_of_rows_sized<64>(rows, stride, queries, count, padded, ahead, out);
    else if (padded == 128) dots_of_rows_sized<128>(rows, stride, queries, count, padded, ahead, out);
    else dots_of_rows_sized<0>(rows, stride, queries, count, padded, ahead, out);
  }

  // J queries against a panel: a register block of J x kPanelBlocks results.
  template <int J>
  struct Block {
    static constexpr int kBlocks = V::kPanelBlocks;
    V v[J][kBlocks];

    // One step of a running sum. The first is a plain product: it differs from fma(x, y, +0) in the sign of a zero at
    // most, which reaches no result, since a zero score is made +0 at the end.
    template <bool First>
    __attribute__((always_inline)) inline void step(const float* panel, const float* query) {
      V x[kBlocks];
#pragma GCC unroll 4
      for (int g = 0; g < kBlocks; ++g) x[g] = V::load(panel + g * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) {
        const V y = V::broadcast(query[j]);
#pragma GCC unroll 4
        for (int g = 0; g < kBlocks; ++g) v[j][g] = First ? V::multiply(x[g], y) : V::fma(x[g], y, v[j][g]);
      }
    }

    // The next 2^Level sums in tree order, combined. Unrolled over the tree, so no branch depends on the position.
    template <int Level>
    __attribute__((always_inline)) inline void subtree(const float*& panel, const float*& query, int64_t steps) {
      if constexpr (Level == 0) {
        step<true>(panel, query);
        panel += kPanelRows, query += J;
        for (int64_t t = 1; t < steps; ++t, panel += kPanelRows, query += J) step<false>(panel, query);
      } else {
        Block left;
        left.template subtree<Level - 1>(panel, query, steps);
        subtree<Level - 1>(panel, query, steps);
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int g = 0; g < kBlocks; ++g) v[j][g] = V::add(left.v[j][g], v[j][g]);
      }
    }
  };

  template <int J>
  static void dots_of_group(const float* panel, const float* query, int64_t steps, float* out) {
    Block<J> block;
    block.template subtree<4>(panel, query, steps);
    for (int j = 0; j < J; ++j)
      for (int g = 0; g < V::kPanelBlocks; ++g) block.v[j][g].store(out + j * kPanelRows + g * kLanes);
  }

  static void dots_of_panel(const float* panel, const float* query_panel, int64_t count, int64_t padded, Ahead ahead,
                            float* out) {
    const int64_t steps = padded / kLanes, groups = (count + kQueryGroup - 1) / kQueryGroup;
    for (int64_t group = 0; group < groups; ++group, count -= kQueryGroup) {
      fetch(ahead, group, groups);
      if (count > 2) dots_of_group<kQueryGroup>(panel, query_panel, steps, out);
      else if (count == 2) dots_of_group<2>(panel, query_panel, steps, out);
      else dots_of_group<1>(panel, query_panel, steps, out);
      query_panel += kQueryGroup * padded;
      out += kQueryGroup * kPanelRows;
    }
  }

  // The largest of a user's dots in each lane, and the lanes in which one is NaN.
  static V largest_of(const float* dots, int64_t stride, int64_t count, uint32_t* nan) {
    V largest = V::load(dots);
    *nan = V::unordered(largest);
    for (int64_t m = 1; m < count; ++m) {
      const V d = V::load(dots + m * stride);
      *nan |= V::unordered(d);
      largest = V::max(d, largest);
    }
    return largest;
  }

  static uint32_t prune_max(const float* dots, int64_t stride, int64_t count, const float* bias, float threshold,
                            float* scores) {
    uint32_t nan;
    const V largest = largest_of(dots, stride, count, &nan);
    return finish(largest, nan, bias, threshold, scores);
  }

  static uint32_t finish(V score, uint32_t nan, const float* bias, float threshold, float* scores) {
    if (bias) {
      score = V::add(score, V::load(bias));
      nan |= V::unordered(score);
    }
    score = V::add(score, V::zero());  // -0 becomes +0
    score.store(scores);
    return ~(nan | V::less(score, V::broadcast(threshold))) & 0xFFFFu;
  }

  // Exponentials are computed only where max + log(count), and room for rounding, reaches the threshold.
  static uint32_t prune_log_sum_exp(const float* dots, int64_t stride, int64_t count, const float* bias,
                                    float threshold, float* scores) {
    uint32_t nan;
    const V largest = largest_of(dots, stride, count, &nan);
    float relative, offset;
    log_sum_exp_excess(count, &relative, &offset);
    V bound = V::add(V::fma(V::abs(largest), V::broadcast(relative), largest), V::broadcast(offset));
    if (bias) bound = V::add(bound, V::load(bias));
    uint32_t survivors = ~(nan | V::less(bound, V::broadcast(threshold))) & 0xFFFFu;
    uint32_t kept = 0;
    for (; survivors; survivors &= survivors - 1) {
      const int i = __builtin_ctz(survivors);
      float score = canonical_log_sum_exp(dots + i, stride, count);
      if (bias) score += bias[i];
      scores[i] = score + 0.0f;
      if (score >= threshold) kept |= 1u << i;
    }
    return kept;
  }

  static void scale_dots(const float* scales, int64_t count, int64_t stride, float* dots) {
    const V scale = V::load(scales);
    for (int64_t q = 0; q < count; ++q, dots += stride) V::multiply(V::load(dots), scale).store(dots);
  }

  static float dot(const float* x, const float* y, int64_t padded) {
    V sums = V::zero();
    for (int64_t e = 0; e < padded; e += kLanes) sums = V::fma(V::load(x + e), V::load(y + e), sums);
    return sum_of_lanes(sums);
  }

  static uint32_t prune_bound(const float* cheap, int64_t stride, int64_t count, const float* slack,
                              const float* scales, const float* lengths, float relative, float offset,
                              const float* bias, float threshold) {
    const V length = V::load(lengths);
    V bound = V::fma(V::broadcast(slack[0]), length, V::load(cheap));
    for (int64_t m = 1; m < count; ++m)
      bound = V::max(V::fma(V::broadcast(slack[m]), length, V::load(cheap + m * stride)), bound);
    bound = V::multiply(bound, V::load(scales));
    if (relative) bound = V::add(V::fma(V::abs(bound), V::broadcast(relative), bound), V::broadcast(offset));
    if (bias) bound = V::add(bound, V::load(bias));
    return ~V::less(bound, V::broadcast(threshold)) & 0xFFFFu;
  }

  // Every lane counts: what a result does not depend on, the compiler leaves out of the measured loop.
  static float sum_of_lanes(V v) {
    float lanes[kLanes];
    v.store(lanes);
    return canonical_tree(lanes);
  }

  static float read_loop(const float* data, int64_t count) {
    V acc[8];
    for (int i = 0; i < 8; ++i) acc[i] = V::zero();
    for (int64_t e = 0; e + 8 * kLanes <= count; e += 8 * kLanes)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) acc[i] = V::add(acc[i], V::load(data + e + i * kLanes));
    for (int i = 1; i < 8; ++i) acc[0] = V::add(acc[0], acc[i]);
    return sum_of_lanes(acc[0]);
  }

  static constexpr int kChains = V::kChains;

  static float fma_loop(int64_t steps) {
    V acc[kChains];
    const V x = V::broadcast(0.999f), y = V::broadcast(0.001f);
    float start[kLanes];
    for (int i = 0; i < kLanes; ++i) start[i] = static_cast<float>(i);  // unequal lanes: no half is redundant
    for (int i = 0; i < kChains; ++i) acc[i] = V::add(V::load(start), V::broadcast(static_cast<float>(i)));
    for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 16
      for (int i = 0; i < kChains; ++i) acc[i] = V::fma(acc[i], x, y);
    for (int i = 1; i < kChains; ++i) acc[0] = V::add(acc[0], acc[i]);
    return sum_of_lanes(acc[0]);
  }

  static constexpr Kernels table(const char* name, const CodeSums* codes) {
    using Partition = PartitionKernelsOf<V>;
    Kernels kernels{};
    kernels.name = name;
    kernels.panel_rows = kPanelRows;
    kernels.stage = stage;
    kernels.widen = widen;
    kernels.gather = gather;
    kernels.transpose = transpose;
    kernels.dots_of_rows = dots_of_rows;
    kernels.dots_of_panel = dots_of_panel;
    kernels.prune_max = prune_max;
    kernels.prune_log_sum_exp = prune_log_sum_exp;
    kernels.add_exponentials = Partition::add_exponentials;
    kernels.shares_max = Partition::shares_max;
    kernels.shares_log_sum_exp = Partition::shares_log_sum_exp;
    kernels.add_products = Partition::add_products;
    kernels.scale_dots = scale_dots;
    kernels.dot = dot;
    kernels.prune_bound = prune_bound;
    using Codes = CodeKernelsOf<V>;
    kernels.to_code_panel = Codes::to_code_panel;
    kernels.from_code_panel = Codes::from_code_panel;
    kernels.rotate_panel = Codes::rotate_panel;
    kernels.encode_panel = Codes::encode_panel;
    kernels.largest_of_panel = [](const float* panel, int64_t r, float* largest) {
      Codes::largest_of_panel(panel, r).store(largest);
    };
    kernels.prune_codes = Codes::prune_codes;
    kernels.bounds_of_queries = Codes::bounds_of_queries;
    kernels.codes = codes;
    kernels.read_loop = read_loop;
    kernels.fma_loop = fma_loop;
    kernels.fma_loop_operations = kChains * kLanes * 2;
    return kernels;
  }
};
