// Sums of products of codes by AVX2. Products of 2-bit and 4-bit codes are added in pairs of 16 bits, which they cannot
// exceed; those of 8-bit codes are widened first, since pairs of them can.
#include <immintrin.h>

#include "code_kernels.h"

namespace urm {
namespace {

constexpr int kRegister = 32;      // bytes: four elements of 8 rows
constexpr int kWide = 64;          // four elements of 16 rows or queries
constexpr int64_t kPairSteps = 8;  // 8 * 2 * 15 * 127 stays below 2^15

int32_t quad_at(const void* quad) {
  int32_t bytes;
  __builtin_memcpy(&bytes, quad, sizeof bytes);
  return bytes;
}

__m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

void store(int32_t* p, __m256i v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
}

// Codes + 128 of four elements of 4 rows, or a query's, as 16-bit integers.
__m256i widen_unsigned(const void* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

__m256i widen_signed(const void* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// A quad's four 16-bit integers, repeated.
__m256i repeat_unsigned(const void* quad) {
  return _mm256_broadcastq_epi64(_mm_cvtepu8_epi16(_mm_cvtsi32_si128(quad_at(quad))));
}

__m256i repeat_signed(const void* quad) {
  return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(quad_at(quad))));
}

// From two sums of pairs for each of 4 + 4 rows to one sum for each of 8.
__m256i join_pairs(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xD8);
}

void largest2(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
              const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest) {
  const __m256i field = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  const int64_t lines = (ahead.lines + blocks * count - 1) / (blocks * count);
  const char *fetch = ahead.address, *fetch_end = ahead.address + ahead.lines * kCacheLine;
  for (int64_t b = 0; b < blocks; ++b, codes += stride) {
    for (int64_t q = 0; q < count; ++q) {
      int32_t* most = largest + (q / kLanes * blocks + b) * kBlockRows;
      for (int64_t i = 0; i < lines && fetch < fetch_end; ++i, fetch += kCacheLine) __builtin_prefetch(fetch, 0, 2);
      const int8_t* query = queries + (q / kLanes * quads * kLanes + q % kLanes) * kQuad;
      __m256i sums[4];  // rows 0..7, 8..15, 16..23, 24..31
      for (__m256i& sum : sums) sum = _mm256_setzero_si256();
      for (int64_t quad = 0; quad < quads;) {
        __m256i pairs[4];
        for (__m256i& pair : pairs) pair = _mm256_setzero_si256();
        for (const int64_t end = quad + 2 * kPairSteps; quad < quads && quad < end; quad += 2) {
          const __m256i u = _mm256_set1_epi32(quad_at(query + quad * kWide));
          const __m256i v =
              quad + 1 < quads ? _mm256_set1_epi32(quad_at(query + (quad + 1) * kWide)) : _mm256_setzero_si256();
          for (int half = 0; half < 2; ++half) {
            const __m256i x = load(codes + quad / 2 * kWide + half * kRegister);
            const auto add = [&](int high, int shift, __m256i by) {
              const __m256i stored = _mm256_and_si256(_mm256_srli_epi16(x, shift), field);
              pairs[2 * high + half] = _mm256_add_epi16(pairs[2 * high + half], _mm256_maddubs_epi16(stored, by));
            };
            add(0, 0, u), add(1, 2, u), add(0, 4, v), add(1, 6, v);
          }
        }
        for (int i = 0; i < 4; ++i) sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], ones));
      }
      for (int i = 0; i < 4; ++i) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(sums[i], 1), _mm256_set1_epi32(starts[q]));
        store(most + 8 * i, q % kLanes ? _mm256_max_epi32(sum, load(most + 8 * i)) : sum);
      }
    }
  }
}

void largest4(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
              const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest) {
  const __m256i low_half = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const int64_t lines = (ahead.lines + blocks * count - 1) / (blocks * count);
  const char *fetch = ahead.address, *fetch_end = ahead.address + ahead.lines * kCacheLine;
  for (int64_t b = 0; b < blocks; ++b, codes += stride) {
    for (int64_t q = 0; q < count; ++q) {
      int32_t* most = largest + (q / kLanes * blocks + b) * kBlockRows;
      for (int64_t i = 0; i < lines && fetch < fetch_end; ++i, fetch += kCacheLine) __builtin_prefetch(fetch, 0, 2);
      const int8_t* query = queries + (q / kLanes * quads * kLanes + q % kLanes) * kQuad;
      __m256i sums[4];  // rows 0..7, 8..15, 16..23, 24..31
      for (__m256i& sum : sums) sum = _mm256_set1_epi32(starts[q]);
      for (int64_t quad = 0; quad < quads;) {
        __m256i pairs[4];
        for (__m256i& pair : pairs) pair = _mm256_setzero_si256();
        for (const int64_t end = quad + kPairSteps < quads ? quad + kPairSteps : quads; quad < end; ++quad) {
          const __m256i u = _mm256_set1_epi32(quad_at(query + quad * kWide));
          for (int half = 0; half < 2; ++half) {
            const __m256i x = load(codes + quad * kWide + half * kRegister);
            const __m256i low = _mm256_and_si256(x, low_half);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), low_half);
            pairs[half] = _mm256_add_epi16(pairs[half], _mm256_maddubs_epi16(low, u));
            pairs[2 + half] = _mm256_add_epi16(pairs[2 + half], _mm256_maddubs_epi16(high, u));
          }
        }
        for (int i = 0; i < 4; ++i) sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs[i], ones));
      }
      for (int i = 0; i < 4; ++i)
        store(most + 8 * i, q % kLanes ? _mm256_max_epi32(sums[i], load(most + 8 * i)) : sums[i]);
    }
  }
}

void largest8(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
              const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest) {
  const int64_t lines = (ahead.lines + blocks * count - 1) / (blocks * count);
  const char *fetch = ahead.address, *fetch_end = ahead.address + ahead.lines * kCacheLine;
  for (int64_t b = 0; b < blocks; ++b, codes += stride) {
    for (int64_t q = 0; q < count; ++q) {
      int32_t* most = largest + (q / kLanes * blocks + b) * kBlockRows;
      for (int64_t i = 0; i < lines && fetch < fetch_end; ++i, fetch += kCacheLine) __builtin_prefetch(fetch, 0, 2);
      const int8_t* query = queries + (q / kLanes * quads * kLanes + q % kLanes) * kQuad;
      __m256i pairs[8];  // four rows each
      for (__m256i& pair : pairs) pair = _mm256_setzero_si256();
      for (int64_t quad = 0; quad < quads; ++quad) {
        const __m256i u = repeat_signed(query + quad * kWide);
        for (int i = 0; i < 8; ++i) {
          const __m256i x = widen_unsigned(codes + quad * 2 * kWide + i * 16);
          pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(x, u));
        }
      }
      for (int i = 0; i < 4; ++i) {
        const __m256i joined = join_pairs(pairs[2 * i], pairs[2 * i + 1]);
        const __m256i sums = _mm256_add_epi32(joined, _mm256_set1_epi32(starts[q]));
        store(most + 8 * i, q % kLanes ? _mm256_max_epi32(sums, load(most + 8 * i)) : sums);
      }
    }
  }
}

void of_row(const uint8_t* row, int64_t quads, const int8_t* queries, const int32_t* starts, int64_t groups,
            int32_t* sums) {
  for (int64_t g = 0; g < groups; ++g, queries += quads * kWide, starts += kLanes, sums += kLanes) {
    __m256i pairs[4];  // four queries each
    for (__m256i& pair : pairs) pair = _mm256_setzero_si256();
    for (int64_t quad = 0; quad < quads; ++quad) {
      const __m256i x = repeat_unsigned(row + quad * kQuad);
      for (int i = 0; i < 4; ++i)
        pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(x, widen_signed(queries + quad * kWide + i * 16)));
    }
    for (int i = 0; i < 2; ++i)
      store(sums + 8 * i, _mm256_add_epi32(join_pairs(pairs[2 * i], pairs[2 * i + 1]), load(starts + 8 * i)));
  }
}

constexpr int kRateChains = 8;

// Products of 4-bit codes, added in pairs: the fastest of these loops.
int32_t rate_loop(int64_t steps) {
  __m256i sums[kRateChains];
  const __m256i x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(-5);
  for (int i = 0; i < kRateChains; ++i) sums[i] = _mm256_set1_epi16(static_cast<int16_t>(i));
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 8
    for (int i = 0; i < kRateChains; ++i)
      sums[i] = _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(_mm256_xor_si256(x, sums[i]), y));
  for (int i = 1; i < kRateChains; ++i) sums[0] = _mm256_add_epi16(sums[0], sums[i]);
  return _mm256_extract_epi16(sums[0], 0);
}

}  // namespace

extern const CodeSums kAvx2CodeSums = {largest2, largest4, largest8, of_row, rate_loop, 2 * kRegister * kRateChains};

}  // namespace urm
