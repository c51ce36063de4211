// 16 floats in one AVX-512 register. Included by the files compiled for AVX-512 only, inside an anonymous namespace
// (see kernels_template.h), after <immintrin.h> and "views.h".
#pragma once

struct Vector {
  static constexpr int kPanelBlocks = 3;
  static constexpr int kRowsAtOnce = 16;
  static constexpr int kChains = 16;  // of the measured ceiling: what registers hold

  __m512 v;

  static Vector zero() { return {_mm512_setzero_ps()}; }
  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vector broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vector fma(Vector x, Vector y, Vector z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
  static Vector multiply(Vector x, Vector y) { return {_mm512_mul_ps(x.v, y.v)}; }
  static Vector divide(Vector x, Vector y) { return {_mm512_div_ps(x.v, y.v)}; }
  static Vector round(Vector x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  static Vector add(Vector x, Vector y) { return {_mm512_add_ps(x.v, y.v)}; }
  static Vector max(Vector x, Vector y) { return {_mm512_max_ps(x.v, y.v)}; }
  static Vector abs(Vector x) { return {_mm512_abs_ps(x.v)}; }
  static uint32_t unordered(Vector x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q); }
  static uint32_t less(Vector x, Vector y) { return _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  // a where x < y, else b.
  static Vector select_less(Vector x, Vector y, Vector a, Vector b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), b.v, a.v)};
  }
  // 2^n for integers n from -126 to 127.
  static Vector power_of_two(Vector n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
  }
  // Lanes whose exponent is in a group, and the sum of their mantissas, each by its place in the group.
  static uint32_t lanes_of_group(const int32_t* exponents, int32_t group) {
    const __m512i groups = _mm512_srai_epi32(_mm512_loadu_si512(exponents), kGroupBits);
    return _mm512_cmpeq_epi32_mask(groups, _mm512_set1_epi32(group));
  }
  static void add_shifted(const int32_t* exponents, const uint32_t* mantissas, uint32_t lanes, uint64_t* sums) {
    for (int half = 0; half < 2; ++half, lanes >>= 8, exponents += 8, mantissas += 8, sums += 8) {
      const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(exponents));
      const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mantissas));
      const __m512i places = _mm512_cvtepi32_epi64(_mm256_and_si256(n, _mm256_set1_epi32(kGroupExponents - 1)));
      const __m512i shifted = _mm512_sllv_epi64(_mm512_cvtepu32_epi64(m), places);
      const __m512i sum = _mm512_loadu_si512(sums);
      _mm512_storeu_si512(sums, _mm512_mask_add_epi64(sum, static_cast<__mmask8>(lanes), sum, shifted));
    }
  }
  static Vector from_integers(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
  void store_integers(int32_t* p) const { _mm512_storeu_si512(p, _mm512_cvtps_epi32(v)); }

  static Vector widen(const char* row, DType dtype, int64_t e) {
    if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(row) + e);
    if (dtype == DType::kFloat8) {
      const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + e)));
      const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7F));
      const __m256i finite = _mm256_slli_epi16(magnitude, 7);
      const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7F));
      const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
      const __m256i half = _mm256_or_si256(sign, _mm256_mask_mov_epi16(finite, nan, _mm256_set1_epi16(0x7E00)));
      return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(kHalfToFloat8))};
    }
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * e));
    if (dtype == DType::kFloat16) return {_mm512_cvtph_ps(half)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
  }

  static float widen_one(const char* row, DType dtype, int64_t e) {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[e];
    if (dtype == DType::kFloat8)
      return _cvtsh_ss(half_of_float8(reinterpret_cast<const uint8_t*>(row)[e])) * kHalfToFloat8;
    const uint16_t half = reinterpret_cast<const uint16_t*>(row)[e];
    if (dtype == DType::kFloat16) return _cvtsh_ss(half);
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(half << 16)));
  }

  // The tree of 16 vectors at once: each level combines and packs two into one, so 15 operations do 16 trees.
  template <class Combine>
  static Vector fold(const Vector* sum, Combine combine) {
    __m512 eight[8], four[4], two[2];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
      const __m512 a = sum[row_of(2 * n)].v, b = sum[row_of(2 * n + 1)].v;
      eight[n] = combine(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n)
      four[n] = combine(_mm512_shuffle_f32x4(eight[2 * n], eight[2 * n + 1], 0x88),
                        _mm512_shuffle_f32x4(eight[2 * n], eight[2 * n + 1], 0xDD));
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n)
      two[n] = combine(_mm512_shuffle_ps(four[2 * n], four[2 * n + 1], 0x44),
                       _mm512_shuffle_ps(four[2 * n], four[2 * n + 1], 0xEE));
    return {combine(_mm512_shuffle_ps(two[0], two[1], 0x88), _mm512_shuffle_ps(two[0], two[1], 0xDD))};
  }

  static Vector tree(const Vector* sum) {
    return fold(sum, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
  }

  // The largest lane of each of 16 vectors.
  static Vector largest(const Vector* v) {
    return fold(v, [](__m512 x, __m512 y) { return _mm512_max_ps(x, y); });
  }

  // Row that must enter the packing at place n so that results come out in row order.
  static constexpr int row_of(int n) { return 4 * (n % 4) + n / 4; }

  static void transpose(Vector* row) {
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
      a[2 * n] = _mm512_unpacklo_ps(row[2 * n].v, row[2 * n + 1].v);
      a[2 * n + 1] = _mm512_unpackhi_ps(row[2 * n].v, row[2 * n + 1].v);
    }
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      b[4 * n] = _mm512_shuffle_ps(a[4 * n], a[4 * n + 2], 0x44);
      b[4 * n + 1] = _mm512_shuffle_ps(a[4 * n], a[4 * n + 2], 0xEE);
      b[4 * n + 2] = _mm512_shuffle_ps(a[4 * n + 1], a[4 * n + 3], 0x44);
      b[4 * n + 3] = _mm512_shuffle_ps(a[4 * n + 1], a[4 * n + 3], 0xEE);
    }
    // b[4 n + c] holds, in 128-bit lane l, element 4 l + c of rows 4 n .. 4 n + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512 low01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88),
                   high01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xDD);
      const __m512 low23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
      const __m512 high23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xDD);
      row[c].v = _mm512_shuffle_f32x4(low01, low23, 0x88);
      row[8 + c].v = _mm512_shuffle_f32x4(low01, low23, 0xDD);
      row[4 + c].v = _mm512_shuffle_f32x4(high01, high23, 0x88);
      row[12 + c].v = _mm512_shuffle_f32x4(high01, high23, 0xDD);
    }
  }
};
