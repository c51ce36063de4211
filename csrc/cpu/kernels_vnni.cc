// AVX-512 VNNI: the AVX-512 kernels with another cheap score, products of 8-bit codes made from each row on its way.
//
// A row x becomes codes c = round(x / a), a = max |x| / 127, so that |x - a c| <= a h sqrt(r) with h a little over 1 /
// 2; a query q likewise u and b, with f >= |q - b u| measured. Then, Cauchy-Schwarz twice,
//
//   |q . x - a b (u . c)| <= f |x| + |b u| a h sqrt(r) <= S a (|x| / a + k h sqrt(r)),   S = max(f, |b u| / k)
//
// for any k; kBalance is about what |b u| / f comes to. S also has the roundings (sum_error of the query's length,
// which is never 0), and a and b are at least 2^-60, so that nothing underflows. u . c is exact in 32-bit integers.
// Codes of rows are stored plus 128, as the instruction multiplies unsigned by signed bytes; -128 sum(u) is where its
// sums start.
#include <immintrin.h>

#include "../common/canonical_dot.h"
#include "kernels.h"

namespace urm {
namespace {

#include "vector_avx512.h"

constexpr int kBlockWidth = 64;  // elements; the four codes of a 32-bit lane are 16 elements apart
constexpr int kQuads = kBlockWidth / 4;
constexpr int kPanelColumns = 4;  // of 16 rows
constexpr int kPanelRows = kPanelColumns * kLanes;
constexpr int kQueries = 4;  // multiplied with a panel at a time
constexpr float kLargestCode = 127.0f;
constexpr float kOffset = 128.0f;
constexpr float kHalf = 0.501f;  // h: rounding to an integer, of a quotient that is itself rounded
constexpr float kBalance = 128.0f;
constexpr float kLeastScale = 0x1p-60f;

int64_t blocks_of(int64_t padded) {
  return (padded + kBlockWidth - 1) / kBlockWidth;
}

// Before its codes, a query has its factor b and where its sums start.
struct QueryHead {
  float scale;
  int32_t start;
};
constexpr int64_t kHeadBytes = kQueries * sizeof(QueryHead);

int64_t group_bytes(int64_t padded) {
  return kHeadBytes + kQueries * blocks_of(padded) * kBlockWidth;
}

// Groups of kQueries: their heads, then [block of 64 elements][quad][query] codes.
void pack_queries(const float* queries, const float* lengths, int64_t count, int64_t padded, DType, void* out,
                  float* slack) {
  const int64_t blocks = blocks_of(padded);
  char* group = static_cast<char*>(out);
  for (int64_t first = 0; first < count; first += kQueries, group += group_bytes(padded)) {
    QueryHead* head = reinterpret_cast<QueryHead*>(group);
    int8_t* codes = reinterpret_cast<int8_t*>(group + kHeadBytes);
    for (int j = 0; j < kQueries; ++j) head[j] = {0.0f, 0};
    for (int64_t i = 0; i < kQueries * blocks * kBlockWidth; ++i) codes[i] = 0;
    for (int64_t j = 0; j < kQueries && first + j < count; ++j) {
      const float* query = queries + (first + j) * padded;
      float largest = 0.0f;
      for (int64_t e = 0; e < padded; ++e)
        largest = __builtin_fabsf(query[e]) > largest ? __builtin_fabsf(query[e]) : largest;
      const float scale = largest / kLargestCode > kLeastScale ? largest / kLargestCode : kLeastScale;
      double lost = 0, kept = 0;
      int32_t total = 0;
      for (int64_t e = 0; e < padded; ++e) {
        const int code = static_cast<int>(__builtin_rintf(query[e] / scale));
        const double value = static_cast<double>(scale) * code, rest = query[e] - value;
        lost += rest * rest;
        kept += value * value;
        total += code;
        const int64_t block = e / kBlockWidth, within = e % kBlockWidth;
        codes[((block * kQuads + within % kQuads) * kQueries + j) * 4 + within / kQuads] = static_cast<int8_t>(code);
      }
      head[j] = {scale, -static_cast<int32_t>(kOffset) * total};
      lost = __builtin_sqrt(lost), kept = __builtin_sqrt(kept) / kBalance;
      const double both = (lost > kept ? lost : kept) + static_cast<double>(sum_error(padded)) * lengths[first + j];
      slack[first + j] = static_cast<float>(both * (1 + 1e-6));
    }
  }
}

__m512 elements(const float* row, int64_t e, int64_t padded) {
  return e < padded ? _mm512_loadu_ps(row + e) : _mm512_setzero_ps();
}

// Panel: [block of 64 elements][quad][row].
void stage(const void* rows, DType, int64_t stride_bytes, int64_t padded, int column, Ahead ahead, void* panel,
           float* scales, float* lengths) {
  constexpr int kAbsoluteMaximum = 0xB;  // of vrangeps, with the sign cleared
  const char* next = ahead.lines ? ahead.address : static_cast<const char*>(rows);
  const int64_t line = ahead.lines ? kCacheLine : 0;
  const auto row_at = [=](int i) {
    return reinterpret_cast<const float*>(static_cast<const char*>(rows) + i * stride_bytes);
  };
  Vector largest[kLanes], squares[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const float* row = row_at(i);
    __m512 most = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
    for (int64_t e = 0; e < padded; e += kLanes, next += line) {
      _mm_prefetch(next, _MM_HINT_T1);
      const __m512 x = _mm512_loadu_ps(row + e);
      most = _mm512_range_ps(most, x, kAbsoluteMaximum);
      sum = _mm512_fmadd_ps(x, x, sum);
    }
    largest[i].v = most, squares[i].v = sum;
  }
  const __m512 scale = _mm512_max_ps(_mm512_div_ps(Vector::largest(largest).v, _mm512_set1_ps(kLargestCode)),
                                     _mm512_set1_ps(kLeastScale));
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
  const __m512 growth = _mm512_set1_ps(1.0f + sum_error(padded));
  const __m512 length = _mm512_mul_ps(_mm512_mul_ps(_mm512_sqrt_ps(Vector::tree(squares).v), growth), inverse);
  const __m512 lost = _mm512_set1_ps(kBalance * kHalf * __builtin_sqrtf(static_cast<float>(padded)));
  _mm512_storeu_ps(scales, scale);
  _mm512_storeu_ps(lengths, _mm512_add_ps(length, lost));

  alignas(64) float inverses[kLanes];
  _mm512_store_ps(inverses, inverse);
  char* to = static_cast<char*>(panel) + column * 4;
  for (int64_t e = 0; e < padded; e += kBlockWidth, to += kQuads * kPanelRows * 4) {
    Vector quad[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      const float* row = row_at(i);
      const __m512 factor = _mm512_set1_ps(inverses[i]), offset = _mm512_set1_ps(kOffset);
      const auto code = [&](int64_t part) {
        return _mm512_cvtps_epi32(_mm512_fmadd_ps(elements(row, e + part * kLanes, padded), factor, offset));
      };
      constexpr int kOrOfThree = 0xFE;
      const __m512i three =
          _mm512_ternarylogic_epi32(code(0), _mm512_slli_epi32(code(1), 8), _mm512_slli_epi32(code(2), 16), kOrOfThree);
      quad[i].v = _mm512_castsi512_ps(_mm512_or_si512(three, _mm512_slli_epi32(code(3), 24)));
    }
    Vector::transpose(quad);
    for (int p = 0; p < kQuads; ++p) quad[p].store(reinterpret_cast<float*>(to + p * kPanelRows * 4));
  }
}

void dots(const void* panel, const void* queries, int64_t count, int64_t padded, float* out) {
  const int64_t quads = blocks_of(padded) * kQuads;
  const char* group = static_cast<const char*>(queries);
  for (int64_t first = 0; first < count; first += kQueries, group += group_bytes(padded)) {
    const QueryHead* head = reinterpret_cast<const QueryHead*>(group);
    const int32_t* codes = reinterpret_cast<const int32_t*>(group + kHeadBytes);
    const char* rows = static_cast<const char*>(panel);
    __m512i sums[kQueries][kPanelColumns];
    for (int j = 0; j < kQueries; ++j)
      for (int g = 0; g < kPanelColumns; ++g) sums[j][g] = _mm512_set1_epi32(head[j].start);
    for (int64_t p = 0; p < quads; ++p, rows += kPanelRows * 4, codes += kQueries) {
      __m512i x[kPanelColumns];
#pragma GCC unroll 4
      for (int g = 0; g < kPanelColumns; ++g) x[g] = _mm512_load_si512(rows + g * 64);
#pragma GCC unroll 4
      for (int j = 0; j < kQueries; ++j) {
        const __m512i u = _mm512_set1_epi32(codes[j]);
#pragma GCC unroll 4
        for (int g = 0; g < kPanelColumns; ++g) sums[j][g] = _mm512_dpbusd_epi32(sums[j][g], x[g], u);
      }
    }
    for (int j = 0; j < kQueries; ++j)
      for (int g = 0; g < kPanelColumns; ++g, out += kLanes)
        _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(sums[j][g]), _mm512_set1_ps(head[j].scale)));
  }
}

int64_t query_bytes(int64_t count, int64_t padded) {
  return (count + kQueries - 1) / kQueries * group_bytes(padded);
}

int64_t panel_bytes(int64_t padded) {
  return kPanelRows * blocks_of(padded) * kBlockWidth;
}

}  // namespace

extern const CheapScore kVnniCheapScore = {kPanelRows,   kQueries, 0,    panel_bytes, query_bytes,
                                           pack_queries, stage,    dots, nullptr,     nullptr};

}  // namespace urm
