// AMX: the AVX-512 kernels with another cheap score, products of bfloat16 tiles. A tile holds 16 rows of 64 bytes;
// one instruction multiplies 16 queries by 16 rows over 32 elements.
//
// Rows and queries are rounded to bfloat16 (a relative 2^-9 an element); sums are fp32, of at most r fused products
// and r/2 additions in an order that does not matter here. Denormal numbers count as zero and become zero, which
// kLeastLength covers.
#include <immintrin.h>

#include "../common/canonical_dot.h"
#include "kernels.h"

namespace urm {
namespace {

#include "vector_avx512.h"

constexpr int kTileRows = 16;    // rows or queries of a tile
constexpr int kTilePairs = 16;   // pairs of neighbouring elements, one to a 32-bit lane
constexpr int kTileWidth = 32;   // elements
constexpr int kTileBytes = 1024;
constexpr int kPanelTiles = 2;   // columns of 16 rows in a panel
constexpr int kPanelRows = kPanelTiles * kTileRows;
constexpr int kQueryTiles = 2;  // of 16 queries, multiplied with a panel at a time

// What _tile_loadconfig reads: eight tiles of 16 rows of 64 bytes. In memory of its own, since GCC 12 takes the
// instruction for one that reads eight bytes only and drops stores to the others.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
extern const TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void enter() {
  _tile_loadconfig(&kTileConfig);
}

void leave() {
  _tile_release();
}

float error(DType items, int64_t r) {
  const float query = 0x1p-9f, row = items == DType::kBFloat16 ? 0.0f : 0x1p-9f;
  return query + row + query * row + sum_error(r);
}

__m512i rounded(const float* from, bool whole) {
  const __m512 low = _mm512_loadu_ps(from), high = whole ? _mm512_loadu_ps(from + 16) : _mm512_setzero_ps();
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// [tile of 16 queries][tile of 32 elements][query][element]
void pack_queries(const float* queries, int64_t count, int64_t padded, void* out) {
  char* to = static_cast<char*>(out);
  for (int64_t first = 0; first < count; first += kTileRows)
    for (int64_t e = 0; e < padded; e += kTileWidth)
      for (int64_t q = first; q < first + kTileRows; ++q, to += 64)
        _mm512_store_si512(to, q < count ? rounded(queries + q * padded + e, e + 16 < padded) : _mm512_setzero_si512());
}

// Panel: [tile of 32 elements][column of 16 rows][pair of elements][row].
void stage(const void* rows, DType dtype, int64_t stride_bytes, int64_t padded, int column, void* panel,
           float* lengths) {
  const char* from = static_cast<const char*>(rows);
  char* to = static_cast<char*>(panel) + column / kTileRows * kTileBytes;
  __m512 squares[4];
  for (auto& s : squares) s = _mm512_setzero_ps();
  for (int64_t e = 0; e < padded; e += kTileWidth, to += kPanelTiles * kTileBytes) {
    Vector pair[kTilePairs];
    for (int i = 0; i < kTileRows; ++i) {
      const char* row = from + i * stride_bytes;
      const __m512i elements = dtype == DType::kBFloat16
                                   ? _mm512_loadu_si512(row + 2 * e)
                                   : rounded(reinterpret_cast<const float*>(row) + e, e + 16 < padded);
      pair[i].v = _mm512_castsi512_ps(elements);
    }
    Vector::transpose(pair);
#pragma GCC unroll 16
    for (int p = 0; p < kTilePairs; ++p) {
      pair[p].store(reinterpret_cast<float*>(to + p * 64));
      const __m512bh x = reinterpret_cast<__m512bh>(pair[p].v);
      squares[p % 4] = _mm512_dpbf16_ps(squares[p % 4], x, x);
    }
  }
  // The rounded row's length, made long enough for the row's own.
  const __m512 total = _mm512_add_ps(_mm512_add_ps(squares[0], squares[1]), _mm512_add_ps(squares[2], squares[3]));
  const __m512 growth = _mm512_set1_ps((1.0f + 0x1p-8f) * (1.0f + sum_error(padded)));
  _mm512_storeu_ps(lengths, _mm512_fmadd_ps(_mm512_sqrt_ps(total), growth, _mm512_set1_ps(kLeastLength)));
}

// Queries' tiles are 4 and 5, rows' 6 and 7, results 0 to 3.
void two_query_tiles(const char* panel, const char* query, int64_t tiles, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* second = query + tiles * kTileBytes;
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(6, panel + 2 * t * kTileBytes, 64);
    _tile_loadd(4, query + t * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + (2 * t + 1) * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second + t * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int kStride = kPanelRows * sizeof(float);
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + kTileRows, kStride);
  _tile_stored(2, out + kTileRows * kPanelRows, kStride);
  _tile_stored(3, out + kTileRows * kPanelRows + kTileRows, kStride);
}

void one_query_tile(const char* panel, const char* query, int64_t tiles, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t t = 0; t < tiles; ++t) {
    _tile_loadd(4, query + t * kTileBytes, 64);
    _tile_loadd(6, panel + 2 * t * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + (2 * t + 1) * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, out, kPanelRows * sizeof(float));
  _tile_stored(1, out + kTileRows, kPanelRows * sizeof(float));
}

void dots(const void* panel, const void* queries, int64_t count, int64_t padded, Ahead ahead, float* out) {
  const char* rows = static_cast<const char*>(panel);
  const char* query = static_cast<const char*>(queries);
  const int64_t tiles = (padded + kTileWidth - 1) / kTileWidth;
  const int64_t blocks = (count + kQueryTiles * kTileRows - 1) / (kQueryTiles * kTileRows);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = ahead.lines * (block + 1) / blocks;
    for (int64_t line = ahead.lines * block / blocks; line < end; ++line) __builtin_prefetch(ahead.address + line * 64);
    if (count - block * kQueryTiles * kTileRows > kTileRows) two_query_tiles(rows, query, tiles, out);
    else one_query_tile(rows, query, tiles, out);
    query += kQueryTiles * tiles * kTileBytes;
    out += kQueryTiles * kTileRows * kPanelRows;
  }
}

}  // namespace

extern const CheapScore kAmxCheapScore = {kPanelRows, 2,     kTileWidth,   kTileRows, 2,     true,
                                          error,      pack_queries, stage, dots,      enter, leave};

}  // namespace urm
