// The table of innermost loops, one filled in per instruction set (kernels_*.cc) from the same template.
//
// A *tile* is kLanes rows. Small numbers of queries read rows as they lie (dots_of_rows); many queries read a *panel*:
// panel_rows rows transposed so that a register holds one element of 16 rows, in the order in which the canonical tree
// consumes its sums. Both end in the same bits.
#pragma once

#include <cstdint>

#include "../common/canonical_dot.h"
#include "../common/exponential_sum.h"
#include "cheap_score.h"
#include "code_kernels.h"
#include "views.h"

namespace urm {

constexpr int kQueryGroup = 4;  // queries that a packed query panel interleaves

struct Kernels {
  const char* name;
  int panel_rows;

  // Widens `count` rows from `row` on to fp32, [16, padded] row-major, zero past `count` and past the end of a row.
  void (*stage)(const MatrixView& items, int64_t row, int64_t count, int64_t padded, float* out);

  // Widens the first row of `row` to `padded` floats.
  void (*widen)(const MatrixView& row, int64_t padded, float* out);

  // Widens the given rows (-1: a zero row) likewise.
  void (*gather)(const MatrixView& items, const int64_t* rows, int64_t count, int64_t padded, float* out);

  // 16 rows of `padded` floats, `stride` apart, into columns [column, column + 16) of a panel.
  void (*transpose)(const float* rows, int64_t stride, int64_t padded, int column, float* panel);

  // out[q * 16 + i] = canonical dot of row i and query q; queries [count, padded].
  void (*dots_of_rows)(const float* rows, int64_t stride, const float* queries, int64_t count, int64_t padded,
                       Ahead ahead, float* out);

  // out[q * panel_rows + i] likewise, for a panel and queries packed by pack_query_panel; out has room for whole
  // groups.
  void (*dots_of_panel)(const float* panel, const float* query_panel, int64_t count, int64_t padded, Ahead ahead,
                        float* out);

  // Scores of 16 rows from a user's `count` dots of each (`stride` apart), plus bias (16 floats or null). Returns the
  // set of lanes whose score is not NaN and not below `threshold`; `scores` holds theirs. prune_log_sum_exp compares
  // an upper bound first and computes exponentials only for lanes that may still win.
  uint32_t (*prune_max)(const float* dots, int64_t stride, int64_t count, const float* bias, float threshold,
                        float* scores);
  uint32_t (*prune_log_sum_exp)(const float* dots, int64_t stride, int64_t count, const float* bias, float threshold,
                                float* scores);

  // Adds exp(scores / temperature) of the given lanes, none of them NaN, to a sum.
  void (*add_exponentials)(const float* scores, uint32_t lanes, float temperature, ExponentialSum* sum);

  // Of 16 rows and a user's `count` dots of each (`stride` apart): scores / temperature, and shares = factor *
  // exp(score / temperature - logarithm). Returns those of the given lanes that have a share; NaN has none. Under max,
  // winners[i] is the lowest of the largest dots; under logsumexp, weights[m * 16 + i] is d score / d dot.
  uint32_t (*shares_max)(const float* dots, int64_t stride, int64_t count, const float* bias, float temperature,
                         float logarithm, float factor, uint32_t lanes, float* scores, float* shares, int32_t* winners);
  uint32_t (*shares_log_sum_exp)(const float* dots, int64_t stride, int64_t count, const float* bias, float temperature,
                                 float logarithm, float factor, uint32_t lanes, float* scores, float* shares,
                                 float* weights);

  // sum = sum over j of factors[j] query[chosen[j]], and block[chosen[j]] += factors[j] row; queries and blocks [.,
  // padded].
  void (*add_products)(const float* row, const float* queries, int64_t padded, const int32_t* chosen,
                       const float* factors, int64_t count, float* block, float* sum);

  // out[q * stride + i] *= scales[i] for 16 rows and `count` queries.
  void (*scale_dots)(const float* scales, int64_t count, int64_t stride, float* dots);

  // One canonical dot.
  float (*dot)(const float* x, const float* y, int64_t padded);

  // Upper bounds of 16 scores from a user's `count` cheap scores of each (`stride` apart, see cheap_score.h): the
  // largest times the row's scale, plus relative * |that| + offset (what the reduction can add), plus bias. Returns the
  // lanes whose bound is not below `threshold`; a length that is not finite makes it infinite or NaN, and neither is.
  uint32_t (*prune_bound)(const float* cheap, int64_t stride, int64_t count, const float* slack, const float* scales,
                          const float* lengths, float relative, float offset, const float* bias, float threshold);

  const CheapScore* cheap;  // or null

  // 16 rows of floats, `stride` apart and a multiple of 16 wide, to [element][row] and back (there padded with zeros).
  void (*to_code_panel)(const float* rows, int64_t stride, int64_t r, float* panel);
  void (*from_code_panel)(const float* panel, int64_t r, float* rows, int64_t stride);
  void (*rotate_panel)(const Rotation& rotation, float* panel);

  // Codes of a rotated panel, which is overwritten; largest_before[i] is the largest |element| before the rotation.
  void (*encode_panel)(float* panel, int64_t r, const float* largest_before, int bits, EncodedRows* out);
  void (*largest_of_panel)(const float* panel, int64_t r, float* largest);

  // Upper bounds of `blocks` blocks from the largest sums of `groups` groups of queries, as prune_bound: bounds
  // [blocks, 32], and the set of rows of each block whose bound is not below `threshold`. sides: where the first
  // block's codes end.
  void (*prune_codes)(const int32_t* sums, int64_t groups, const char* sides, int64_t stride, int64_t blocks,
                      const CodeBound& user, float relative, float offset, const float* bias, float threshold,
                      float* bounds, uint32_t* survivors);

  // Upper bounds of one row's dots with 16 queries.
  void (*bounds_of_queries)(const int32_t* sums, const float* kept, const float* lost, const CodedRow& row,
                            const CodeBound& user, float* bounds);

  const CodeSums* codes;

  // Measured ceilings: sum of a buffer (count floats), and `steps` rounds of independent multiply-adds.
  float (*read_loop)(const float* data, int64_t count);
  float (*fma_loop)(int64_t steps);
  int64_t fma_loop_operations;  // floating-point operations of one step
};

// The usable tables, best first. find_kernels returns null for an unknown or unsupported name; "" is the best.
const Kernels* const* usable_kernels(int* count);
const Kernels* find_kernels(const char* name);

// Queries [count, padded] into groups of kQueryGroup: [group][tree order of the 16 sums][step][query in group].
// The last group is as wide as what is left over, rounded up to a power of two, zeros in the gap.
void pack_query_panel(const float* queries, int64_t count, int64_t padded, float* out);
int64_t query_panel_floats(int64_t count, int64_t padded);

// Position p of the tree order holds sum bit_reverse(p): 0, 8, 4, 12, ...; neighbours are then added first.
constexpr int kTreeOrder[kLanes] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

}  // namespace urm
