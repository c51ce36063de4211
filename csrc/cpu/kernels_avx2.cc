// AVX2, FMA and F16C: two registers hold the 16 running sums of a canonical dot.
#include <immintrin.h>

#include "../common/canonical_dot.h"
#include "../common/log_sum_exp.h"
#include "kernels.h"

namespace urm {

extern const CodeSums kAvx2CodeSums;

namespace {

struct Vector {
  static constexpr int kPanelBlocks = 1;
  static constexpr int kRowsAtOnce = 4;
  static constexpr int kChains = 6;  // of the measured ceiling: what registers hold

  __m256 low, high;

  static Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Vector load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static Vector broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Vector fma(Vector x, Vector y, Vector z) {
    return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
  }
  static Vector multiply(Vector x, Vector y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }
  static Vector divide(Vector x, Vector y) { return {_mm256_div_ps(x.low, y.low), _mm256_div_ps(x.high, y.high)}; }
  static Vector round(Vector x) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, kNearest), _mm256_round_ps(x.high, kNearest)};
  }
  static Vector add(Vector x, Vector y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }
  static Vector max(Vector x, Vector y) { return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)}; }
  static Vector abs(Vector x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
  }
  static uint32_t mask(__m256 low, __m256 high) {
    return static_cast<uint32_t>(_mm256_movemask_ps(low)) | static_cast<uint32_t>(_mm256_movemask_ps(high)) << 8;
  }
  static uint32_t unordered(Vector x) {
    return mask(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q));
  }
  static uint32_t less(Vector x, Vector y) {
    return mask(_mm256_cmp_ps(x.low, y.low, _CMP_LT_OQ), _mm256_cmp_ps(x.high, y.high, _CMP_LT_OQ));
  }
  void store(float* p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  static Vector select_less(Vector x, Vector y, Vector a, Vector b) {
    return {_mm256_blendv_ps(b.low, a.low, _mm256_cmp_ps(x.low, y.low, _CMP_LT_OQ)),
            _mm256_blendv_ps(b.high, a.high, _mm256_cmp_ps(x.high, y.high, _CMP_LT_OQ))};
  }
  static Vector power_of_two(Vector n) {
    const auto power = [](__m256 n) {
      const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
      return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    return {power(n.low), power(n.high)};
  }
  static uint32_t lanes_of_group(const int32_t* exponents, int32_t group) {
    const __m256i wanted = _mm256_set1_epi32(group);
    const auto same = [&](const int32_t* n) {
      const __m256i groups = _mm256_srai_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(n)), kGroupBits);
      return _mm256_castsi256_ps(_mm256_cmpeq_epi32(groups, wanted));
    };
    return mask(same(exponents), same(exponents + 8));
  }
  static void add_shifted(const int32_t* exponents, const uint32_t* mantissas, uint32_t lanes, uint64_t* sums) {
    const __m128i bits = _mm_setr_epi32(1, 2, 4, 8), place = _mm_set1_epi32(kGroupExponents - 1);
    for (int quarter = 0; quarter < 4; ++quarter, lanes >>= 4, exponents += 4, mantissas += 4, sums += 4) {
      const __m128i chosen = _mm_cmpeq_epi32(_mm_and_si128(_mm_set1_epi32(static_cast<int>(lanes)), bits), bits);
      const __m128i n = _mm_loadu_si128(reinterpret_cast<const __m128i*>(exponents));
      const __m128i m = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(mantissas)), chosen);
      const __m256i shifted =
          _mm256_sllv_epi64(_mm256_cvtepu32_epi64(m), _mm256_cvtepi32_epi64(_mm_and_si128(n, place)));
      __m256i* at = reinterpret_cast<__m256i*>(sums);
      _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), shifted));
    }
  }
  static Vector from_integers(const int32_t* p) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(p);
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(halves)), _mm256_cvtepi32_ps(_mm256_loadu_si256(halves + 1))};
  }
  void store_integers(int32_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_cvtps_epi32(high));
  }

  static __m256 widen_eight(const char* from, DType dtype) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (dtype == DType::kFloat16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  static __m256 widen_eight_float8(const char* from) {
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7F));
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7F));
    const __m128i finite = _mm_slli_epi16(magnitude, 7);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
    const __m128i half = _mm_or_si128(sign, _mm_blendv_epi8(finite, _mm_set1_epi16(0x7E00), nan));
    return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(kHalfToFloat8));
  }

  static Vector widen(const char* row, DType dtype, int64_t e) {
    if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(row) + e);
    if (dtype == DType::kFloat8) return {widen_eight_float8(row + e), widen_eight_float8(row + e + 8)};
    return {widen_eight(row + 2 * e, dtype), widen_eight(row + 2 * e + 16, dtype)};
  }

  static float widen_one(const char* row, DType dtype, int64_t e) {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[e];
    if (dtype == DType::kFloat8)
      return _cvtsh_ss(half_of_float8(reinterpret_cast<const uint8_t*>(row)[e])) * kHalfToFloat8;
    const uint16_t half = reinterpret_cast<const uint16_t*>(row)[e];
    if (dtype == DType::kFloat16) return _cvtsh_ss(half);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(half << 16)));
  }

  // Canonical trees of eight vectors into one register, in order.
  static __m256 tree_of_eight(const Vector* sum) {
    __m256 eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) eight[n] = _mm256_add_ps(sum[n].low, sum[n].high);
    // Rows n and n + 4 share a register from here on, one to a 128-bit half.
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n)
      four[n] = _mm256_add_ps(_mm256_permute2f128_ps(eight[n], eight[n + 4], 0x20),
                              _mm256_permute2f128_ps(eight[n], eight[n + 4], 0x31));
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n)
      two[n] =
          _mm256_add_ps(_mm256_shuffle_ps(four[n], four[n + 2], 0x44), _mm256_shuffle_ps(four[n], four[n + 2], 0xEE));
    // two[n] holds rows n, n, n + 2, n + 2 (and four more).
    const __m256 even = _mm256_shuffle_ps(two[0], two[1], 0x88), odd = _mm256_shuffle_ps(two[0], two[1], 0xDD);
    return _mm256_permute_ps(_mm256_add_ps(even, odd), 0xD8);
  }

  static Vector tree(const Vector* sum) { return {tree_of_eight(sum), tree_of_eight(sum + 8)}; }

  static void transpose_eight(__m256* row) {
    __m256 a[8], b[8];
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      a[2 * n] = _mm256_unpacklo_ps(row[2 * n], row[2 * n + 1]);
      a[2 * n + 1] = _mm256_unpackhi_ps(row[2 * n], row[2 * n + 1]);
    }
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      b[4 * n] = _mm256_shuffle_ps(a[4 * n], a[4 * n + 2], 0x44);
      b[4 * n + 1] = _mm256_shuffle_ps(a[4 * n], a[4 * n + 2], 0xEE);
      b[4 * n + 2] = _mm256_shuffle_ps(a[4 * n + 1], a[4 * n + 3], 0x44);
      b[4 * n + 3] = _mm256_shuffle_ps(a[4 * n + 1], a[4 * n + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      row[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
      row[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
  }

  static void transpose(Vector* row) {
    __m256 quarter[4][8];
    for (int i = 0; i < 8; ++i) {
      quarter[0][i] = row[i].low;
      quarter[1][i] = row[i].high;
      quarter[2][i] = row[i + 8].low;
      quarter[3][i] = row[i + 8].high;
    }
    for (auto& q : quarter) transpose_eight(q);
    for (int i = 0; i < 8; ++i) {
      row[i] = {quarter[0][i], quarter[2][i]};
      row[i + 8] = {quarter[1][i], quarter[3][i]};
    }
  }
};

#include "kernels_template.h"

}  // namespace

extern const Kernels kAvx2Kernels = KernelsOf<Vector>::table("avx2", &kAvx2CodeSums);

}  // namespace urm
