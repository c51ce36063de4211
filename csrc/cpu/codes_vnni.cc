// Sums of products of codes by AVX-512 VNNI: 64 products of unsigned codes of rows and signed ones of queries at a time,
// added by fours, exactly.
#include <immintrin.h>

#include "code_kernels.h"

namespace urm {
namespace {

constexpr int kRegister = 64;           // bytes: four elements of 16 rows
constexpr int kIntoSecondLevel = 2;     // of prefetches, as in kernels_template.h
constexpr int kMostQueries = 8;         // multiplied with a block at a time

// Memory to be fetched, spread evenly over `steps` steps.
struct Fetch {
  const char* next;
  int64_t lines, steps;
  int64_t due = 0;

  __attribute__((always_inline)) inline void step() {
    for (due += lines; due >= steps; due -= steps, next += kCacheLine) __builtin_prefetch(next, 0, kIntoSecondLevel);
  }
};

__attribute__((always_inline)) inline __m512i query_quad(const int8_t* quad) {
  int32_t bytes;
  __builtin_memcpy(&bytes, quad, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

__attribute__((always_inline)) inline void keep_largest(int32_t* largest, __m512i sums, bool first) {
  _mm512_storeu_si512(largest, first ? sums : _mm512_max_epi32(sums, _mm512_loadu_si512(largest)));
}

// Q queries with `Blocks` blocks. The codes of rows 16..31 stand in the high halves of the bytes: the sum with whole bytes
// less that with low halves is 16 times theirs, so a single `and` serves both.
template <int Q, int Blocks>
void largest4_of(const char* codes, int64_t stride, int64_t quads, const int8_t* queries, const int32_t* starts,
                 bool first, Fetch& fetch, int32_t* largest) {
  __m512i low[Q][Blocks], both[Q][Blocks];
  for (int q = 0; q < Q; ++q)
    for (int b = 0; b < Blocks; ++b) {
      low[q][b] = _mm512_set1_epi32(starts[q]);
      both[q][b] = _mm512_set1_epi32(17 * starts[q]);
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
      const __m512i u = query_quad(queries + q * kQuad);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        low[q][b] = _mm512_dpbusd_epi32(low[q][b], x_low[b], u);
        both[q][b] = _mm512_dpbusd_epi32(both[q][b], x[b], u);
      }
    }
    fetch.step();
  }
  for (int b = 0; b < Blocks; ++b) {
    __m512i low_most = low[0][b], high_most = _mm512_srai_epi32(_mm512_sub_epi32(both[0][b], low[0][b]), 4);
    for (int q = 1; q < Q; ++q) {
      low_most = _mm512_max_epi32(low_most, low[q][b]);
      high_most = _mm512_max_epi32(high_most, _mm512_srai_epi32(_mm512_sub_epi32(both[q][b], low[q][b]), 4));
    }
    keep_largest(largest + b * kBlockRows, low_most, first);
    keep_largest(largest + b * kBlockRows + kLanes, high_most, first);
  }
}

template <int Q, int Blocks>
void largest8_of(const char* codes, int64_t stride, int64_t quads, const int8_t* queries, const int32_t* starts,
                 bool first, Fetch& fetch, int32_t* largest) {
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
      const __m512i u = query_quad(queries + q * kQuad);
#pragma GCC unroll 4
      for (int b = 0; b < Blocks; ++b) {
        sums[q][b][0] = _mm512_dpbusd_epi32(sums[q][b][0], x[b][0], u);
        sums[q][b][1] = _mm512_dpbusd_epi32(sums[q][b][1], x[b][1], u);
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

template <int Bits, int Q, int Blocks>
void some_queries(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
                  const int32_t* starts, bool first, Fetch& fetch, int32_t* largest) {
  constexpr auto together = Bits == 4 ? largest4_of<Q, Blocks> : largest8_of<Q, Blocks>;
  constexpr auto alone = Bits == 4 ? largest4_of<Q, 1> : largest8_of<Q, 1>;
  int64_t b = 0;
  for (; b + Blocks <= blocks; b += Blocks)
    together(codes + b * stride, stride, quads, queries, starts, first, fetch, largest + b * kBlockRows);
  for (; b < blocks; ++b)
    alone(codes + b * stride, stride, quads, queries, starts, first, fetch, largest + b * kBlockRows);
}

template <int Bits>
void largest(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
             const int32_t* starts, int64_t count, Ahead ahead, int32_t* largest) {
  const auto calls = [=](int64_t together) { return blocks / together + blocks % together; };
  const int64_t rest = count % kMostQueries;
  const int64_t passes = count / kMostQueries * blocks + (rest & 4 ? calls(2) : 0) + (rest & 2 ? calls(4) : 0) +
                         (rest & 1 ? calls(4) : 0);
  Fetch fetch{ahead.address, ahead.lines, passes * quads};
  for (int64_t q = 0; q < count;) {
    const int8_t* group = queries + (q / kLanes * quads * kLanes + q % kLanes) * kQuad;
    const int64_t left = count - q;
    const bool first = q % kLanes == 0;
    int32_t* most = largest + q / kLanes * blocks * kBlockRows;
    if (left >= 8) {
      some_queries<Bits, 8, 1>(codes, stride, blocks, quads, group, starts + q, first, fetch, most);
      q += 8;
    } else if (left >= 4) {
      some_queries<Bits, 4, 2>(codes, stride, blocks, quads, group, starts + q, first, fetch, most);
      q += 4;
    } else if (left >= 2) {
      some_queries<Bits, 2, 4>(codes, stride, blocks, quads, group, starts + q, first, fetch, most);
      q += 2;
    } else {
      some_queries<Bits, 1, 4>(codes, stride, blocks, quads, group, starts + q, first, fetch, most);
      q += 1;
    }
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
        chain[c] =
            _mm512_dpbusd_epi32(chain[c], query_quad(reinterpret_cast<const int8_t*>(row) + (quad + c) * kQuad),
                                _mm512_loadu_si512(queries + c * kRegister));
    for (; quad < quads; ++quad, queries += kRegister)
      chain[0] = _mm512_dpbusd_epi32(chain[0], query_quad(reinterpret_cast<const int8_t*>(row) + quad * kQuad),
                                     _mm512_loadu_si512(queries));
    _mm512_storeu_si512(
        sums, _mm512_add_epi32(_mm512_add_epi32(chain[0], chain[1]), _mm512_add_epi32(chain[2], chain[3])));
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

extern const CodeSums kVnniCodeSums = {largest<4>, largest<8>, of_row, rate_loop, 2 * kRegister * kRateChains};

}  // namespace urm
