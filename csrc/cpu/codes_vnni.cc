// Sums of products of codes by AVX-512 VNNI: 64 products of unsigned codes of rows and signed ones of queries at a
// time, added by fours, exactly.
#include <immintrin.h>

#include "code_kernels.h"

namespace urm {
namespace {

constexpr int kRegister = 64;        // bytes: four elements of 16 rows
constexpr int kIntoSecondLevel = 2;  // of prefetches, as in kernels_template.h

// Memory to be fetched, `Each` prefetches at every step, which overlap where there are more than lines. Their number is
// constant: a loop or branch here makes GCC 12 copy all sums around it.
template <int Each>
struct Fetch {
  const char* next = nullptr;
  int64_t stride = 0;

  Fetch(Ahead ahead, int64_t steps)
      : next(ahead.address), stride((ahead.lines * kCacheLine + steps * Each - 1) / (steps * Each)) {}

  __attribute__((always_inline)) inline void step() {
#pragma GCC unroll 8
    for (int i = 0; i < Each; ++i) __builtin_prefetch(next + i * stride, 0, kIntoSecondLevel);
    next += Each * stride;
  }
};

template <>
struct Fetch<0> {
  Fetch(Ahead, int64_t) {}
  __attribute__((always_inline)) inline void step() {}
};

__attribute__((always_inline)) inline __m512i repeated_quad(const void* quad) {
  int32_t bytes;
  __builtin_memcpy(&bytes, quad, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// Not _mm512_dpbusd_epi32, around which GCC 12 copies every sum to another register and back.
__attribute__((always_inline)) inline void add_products(__m512i& sums, __m512i rows, __m512i query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(rows), "v"(query));
}

__attribute__((always_inline)) inline void keep_largest(int32_t* largest, __m512i sums, bool first) {
  _mm512_storeu_si512(largest, first ? sums : _mm512_max_epi32(sums, _mm512_loadu_si512(largest)));
}

// Q queries with `Blocks` blocks. A byte's halves belong to two quads; within each, the codes of rows 16..31 stand two
// bits above those of rows 0..15: the sum with both less the one with the low two is four times theirs. What is stored
// is doubled in the end, so that sums are those of c + 3.
template <int Q, int Blocks, class Fetch>
__attribute__((always_inline)) inline void largest2_of(const char* codes, int64_t stride, int64_t quads,
                                                       const int8_t* queries, const int32_t* starts, bool first,
                                                       Fetch& fetch, int32_t* largest) {
  __m512i low[Q][Blocks], both[Q][Blocks];
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < Blocks; ++b) low[q][b] = both[q][b] = _mm512_setzero_si512();
  const __m512i half = _mm512_set1_epi8(15), field = _mm512_set1_epi8(3);
  for (int64_t pair = 0; pair < (quads + 1) / 2; ++pair, codes += kRegister, queries += 2 * kRegister) {
    const bool whole = 2 * pair + 1 < quads;  // or the last quad has no other
    __m512i x[Blocks][2], x_low[Blocks][2];
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      const __m512i loaded = _mm512_loadu_si512(codes + b * stride);
      x[b][0] = _mm512_and_si512(loaded, half);
      x[b][1] = _mm512_and_si512(_mm512_srli_epi16(loaded, 4), half);
      x_low[b][0] = _mm512_and_si512(x[b][0], field);
      x_low[b][1] = _mm512_and_si512(x[b][1], field);
    }
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      if (odd && !whole) break;
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
        const __m512i u = repeated_quad(queries + odd * kRegister + q * kQuad);
#pragma GCC unroll 4
        for (int b = 0; b < Blocks; ++b) {
          add_products(low[q][b], x_low[b][odd], u);
          add_products(both[q][b], x[b][odd], u);
        }
      }
    }
    fetch.step();
  }
  for (int b = 0; b < Blocks; ++b) {
    __m512i low_most, high_most;
    for (int q = 0; q < Q; ++q) {
      const __m512i start = _mm512_set1_epi32(starts[q]);
      const __m512i four_high = _mm512_sub_epi32(both[q][b], low[q][b]);
      const __m512i low_sum = _mm512_add_epi32(_mm512_slli_epi32(low[q][b], 1), start);
      const __m512i high_sum = _mm512_add_epi32(_mm512_srai_epi32(four_high, 1), start);
      low_most = q ? _mm512_max_epi32(low_most, low_sum) : low_sum;
      high_most = q ? _mm512_max_epi32(high_most, high_sum) : high_sum;
    }
    keep_largest(largest + b * kBlockRows, low_most, first);
    keep_largest(largest + b * kBlockRows + kLanes, high_most, first);
  }
}

// Q queries with `Blocks` blocks. The codes of rows 16..31 stand in the high halves of the bytes: the sum with whole
// bytes less that with low halves is 16 times theirs, so a single `and` serves both.
template <int Q, int Blocks, class Fetch>
__attribute__((always_inline)) inline void largest4_of(const char* codes, int64_t stride, int64_t quads,
                                                       const int8_t* queries, const int32_t* starts, bool first,
                                                       Fetch& fetch, int32_t* largest) {
  __m512i low[Q][Blocks], both[Q][Blocks];
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < Blocks; ++b) {
      low[q][b] = _mm512_set1_epi32(starts[q]);
      both[q][b] = _mm512_add_epi32(_mm512_slli_epi32(low[q][b], 4), low[q][b]);
    }
  const __m512i low_half = _mm512_set1_epi8(15);
  for (int64_t quad = 0; quad < quads; ++quad, codes += kRegister, queries += kRegister) {
    __m512i x[Blocks], x_low[Blocks];
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      x[b] = _mm512_loadu_si512(codes + b * stride);
      x_low[b] = _mm512_and_si512(x[b], low_half);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const __m512i u = repeated_quad(queries + q * kQuad);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        add_products(low[q][b], x_low[b], u);
        add_products(both[q][b], x[b], u);
      }
    }
    fetch.step();
  }
  for (int b = 0; b < Blocks; ++b) {
    __m512i low_most = low[0][b], high_most = _mm512_sub_epi32(both[0][b], low[0][b]);
    for (int q = 1; q < Q; ++q) {
      low_most = _mm512_max_epi32(low_most, low[q][b]);
      high_most = _mm512_max_epi32(high_most, _mm512_sub_epi32(both[q][b], low[q][b]));
    }
    keep_largest(largest + b * kBlockRows, low_most, first);
    keep_largest(largest + b * kBlockRows + kLanes, _mm512_srai_epi32(high_most, 4), first);
  }
}

template <int Q, int Blocks, class Fetch>
__attribute__((always_inline)) inline void largest8_of(const char* codes, int64_t stride, int64_t quads,
                                                       const int8_t* queries, const int32_t* starts, bool first,
                                                       Fetch& fetch, int32_t* largest) {
  __m512i sums[Q][Blocks][2];
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < Blocks; ++b) sums[q][b][0] = sums[q][b][1] = _mm512_set1_epi32(starts[q]);
  for (int64_t quad = 0; quad < quads; ++quad, codes += 2 * kRegister, queries += kRegister) {
    __m512i x[Blocks][2];
#pragma GCC unroll 4
    for (int b = 0; b < Blocks; ++b) {
      x[b][0] = _mm512_loadu_si512(codes + b * stride);
      x[b][1] = _mm512_loadu_si512(codes + b * stride + kRegister);
    }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const __m512i u = repeated_quad(queries + q * kQuad);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        add_products(sums[q][b][0], x[b][0], u);
        add_products(sums[q][b][1], x[b][1], u);
      }
    }
    fetch.step();
  }
  for (int b = 0; b < Blocks; ++b)
    for (int half = 0; half < 2; ++half) {
      __m512i most = sums[0][b][half];
      for (int q = 1; q < Q; ++q) most = _mm512_max_epi32(most, sums[q][b][half]);
      keep_largest(largest + b * kBlockRows + half * kLanes, most, first);
    }
}

template <int Bits, int Q, int Blocks, class Fetch>
__attribute__((always_inline)) inline void one_call(const char* codes, int64_t stride, int64_t quads,
                                                    const int8_t* queries, const int32_t* starts, bool first,
                                                    Fetch& fetch, int32_t* largest) {
  if constexpr (Bits == 2) largest2_of<Q, Blocks>(codes, stride, quads, queries, starts, first, fetch, largest);
  else if constexpr (Bits == 4) largest4_of<Q, Blocks>(codes, stride, quads, queries, starts, first, fetch, largest);
  else largest8_of<Q, Blocks>(codes, stride, quads, queries, starts, first, fetch, largest);
}

// `Quads`, where it is not 0, is known to the compiler.
template <int Bits, int Q, int Blocks, int Quads, bool Fetching>
void some_queries(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                  const int32_t* starts, bool first, Ahead ahead, int32_t* largest) {
  if (Quads) quads = Quads;
  // A block's sides are some more lines than its steps.
  const int64_t steps = Bits == 2 ? (quads + 1) / 2 : quads;
  Fetch<Fetching ? Blocks + 1 : 0> fetch(ahead, (blocks / Blocks + blocks % Blocks) * steps);
  int64_t b = 0;
  for (; b + Blocks <= blocks; b += Blocks)
    one_call<Bits, Q, Blocks>(codes + b * stride, stride, quads, queries, starts, first, fetch,
                              largest + b * kBlockRows);
  if constexpr (Blocks > 1)
    for (; b < blocks; ++b)
      one_call<Bits, Q, 1>(codes + b * stride, stride, quads, queries, starts, first, fetch, largest + b * kBlockRows);
}

template <int Bits, int Q, int Blocks, bool Fetching>
void some_queries_sized(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                        const int32_t* starts, bool first, Ahead ahead, int32_t* largest) {
  const auto sized = quads == 32   ? some_queries<Bits, Q, Blocks, 32, Fetching>
                     : quads == 16 ? some_queries<Bits, Q, Blocks, 16, Fetching>
                                   : some_queries<Bits, Q, Blocks, 0, Fetching>;
  sized(codes, stride, blocks, quads, queries, starts, first, ahead, largest);
}

// Queries [q, q + Q); memory ahead is fetched along with the first.
template <int Bits, int Q, int Blocks>
int64_t next_queries(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                     const int32_t* starts, int64_t q, Ahead ahead, int32_t* largest) {
  const auto pass =
      ahead.lines ? some_queries_sized<Bits, Q, Blocks, true> : some_queries_sized<Bits, Q, Blocks, false>;
  pass(codes, stride, blocks, quads, queries + (q / kLanes * quads * kLanes + q % kLanes) * kQuad, starts + q,
       q % kLanes == 0, ahead, largest + q / kLanes * blocks * kBlockRows);
  return q + Q;
}

template <int Bits>
void largest(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
             const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest) {
  for (int64_t q = 0; q < count; ahead.lines = 0) {
    const int64_t left = count - q;
    const auto next = left >= 8   ? next_queries<Bits, 8, 1>
                      : left >= 4 ? next_queries<Bits, 4, 2>
                      : left >= 2 ? next_queries<Bits, 2, 4>
                                  : next_queries<Bits, 1, 4>;
    q = next(codes, stride, blocks, quads, queries, starts, q, ahead, largest);
  }
}

void of_row(const uint8_t* row, int64_t quads, const int8_t* queries, const int32_t* starts, int64_t groups,
            int32_t* sums) {
  constexpr int kChains = 4;
  for (int64_t g = 0; g < groups; ++g, starts += kLanes, sums += kLanes) {
    __m512i chain[kChains] = {_mm512_loadu_si512(starts), _mm512_setzero_si512(), _mm512_setzero_si512(),
                              _mm512_setzero_si512()};
    int64_t quad = 0;
    for (; quad + kChains <= quads; quad += kChains, queries += kChains * kRegister)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c)
        add_products(chain[c], repeated_quad(row + (quad + c) * kQuad), _mm512_loadu_si512(queries + c * kRegister));
    for (; quad < quads; ++quad, queries += kRegister)
      add_products(chain[0], repeated_quad(row + quad * kQuad), _mm512_loadu_si512(queries));
    _mm512_storeu_si512(sums,
                        _mm512_add_epi32(_mm512_add_epi32(chain[0], chain[1]), _mm512_add_epi32(chain[2], chain[3])));
  }
}

constexpr int kRateChains = 16;

int32_t rate_loop(int64_t steps) {
  __m512i sums[kRateChains];
  const __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(-5);
  for (int i = 0; i < kRateChains; ++i) sums[i] = _mm512_set1_epi32(i);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < kRateChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], x, y);
  for (int i = 1; i < kRateChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  return _mm512_reduce_add_epi32(sums[0]);
}

}  // namespace

extern const CodeSums kVnniCodeSums = {largest<2>, largest<4>, largest<8>,
                                       of_row,     rate_loop,  2 * kRegister * kRateChains};

}  // namespace urm
