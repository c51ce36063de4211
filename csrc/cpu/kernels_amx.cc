// AMX: the AVX-512 kernels with another cheap score, products of bfloat16 tiles. A tile holds 16 rows of 64 bytes; one
// instruction multiplies 16 queries by 16 rows over 32 elements.
//
// Each element of a bfloat16 row is taken as it is; a float32 element x is cut to the 8 significant bits of xc, so that
// 1 <= x / xc < 1 + 2^-7. Queries for such rows are lengthened by 1 + 2^-8, which leaves an error of 2^-8 |x| to either
// side, no more than rounding would; cutting costs half of it. Queries are then rounded, by at most 2^-8 / (1 + 2^-8),
// so that both together are within 2^-7. Sums are fp32, in an order that does not matter here: 3 r / 2 roundings are
// allowed for. Denormal numbers count as zero and become zero, which kLeastLength covers.
#include <immintrin.h>

#include "../common/canonical_dot.h"
#include "kernels.h"

namespace urm {
namespace {

#include "vector_avx512.h"

constexpr int kTileRows = 16;           // rows or queries of a tile
constexpr int kTileWidth = 32;          // elements
constexpr int kTilePairs = 16;          // pairs of elements, one to a 32-bit lane
constexpr int kLineBytes = kCacheLine;  // of a tile's row
constexpr int kTileBytes = kTileRows * kLineBytes;
constexpr int kPanelTiles = 4;  // columns of 16 rows in a panel
constexpr int kPanelRows = kPanelTiles * kTileRows;
constexpr float kRounding = 0x1p-8f;     // of a number to bfloat16, relative
constexpr float kLengthening = 0x1p-8f;  // of queries for rows that were cut

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

float error(DType rows, int64_t r) {
  const float row = rows == DType::kBFloat16 ? 0.0f : kRounding;
  return row + kRounding + sum_error(r);
}

// Elements of a bfloat16 row are paired with their neighbour, those of a float32 row with the one 16 further on.
__m512i rounded(__m512 low, __m512 high, DType rows) {
  const __m512i neighbours = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
  if (rows == DType::kBFloat16) return neighbours;
  const __m512i apart = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(apart, neighbours);
}

// [tile of 16 queries][tile of 32 elements][query][element]
void pack_queries(const float* queries, const float* lengths, int64_t count, int64_t padded, DType rows, void* out,
                  float* slack) {
  const __m512 longer = _mm512_set1_ps(rows == DType::kBFloat16 ? 1.0f : 1.0f + kLengthening);
  char* to = static_cast<char*>(out);
  for (int64_t first = 0; first < count; first += kTileRows)
    for (int64_t e = 0; e < padded; e += kTileWidth)
      for (int64_t q = first; q < first + kTileRows; ++q, to += kLineBytes) {
        const auto half = [&](int64_t from) {
          return q < count && from < padded ? _mm512_mul_ps(_mm512_loadu_ps(queries + q * padded + from), longer)
                                            : _mm512_setzero_ps();
        };
        _mm512_store_si512(to, rounded(half(e), half(e + kLanes), rows));
      }
  for (int64_t q = 0; q < count; ++q) slack[q] = error(rows, padded) * lengths[q];
}

// A line of a tile, 32 elements in bfloat16, from elements [e, e + 32) of a row; adds their squares to `squares`.
template <bool kHalf>
__m512i line_of(const char* row, int64_t e, int64_t padded, __m512& squares) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  __m512i line, low, high;
  if (kHalf) {
    line = _mm512_loadu_si512(row + 2 * e);
    low = _mm512_slli_epi32(line, 16);
    high = _mm512_and_si512(line, upper);
  } else {
    const float* from = reinterpret_cast<const float*>(row) + e;
    low = _mm512_loadu_si512(from);
    high = e + kLanes < padded ? _mm512_loadu_si512(from + kLanes) : _mm512_setzero_si512();
    line = _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, upper));
  }
  squares = _mm512_fmadd_ps(_mm512_castsi512_ps(low), _mm512_castsi512_ps(low), squares);
  squares = _mm512_fmadd_ps(_mm512_castsi512_ps(high), _mm512_castsi512_ps(high), squares);
  return line;
}

// Panel: [tile of 32 elements][column of 16 rows][pair of elements][row]. Rows are read one after the other, as memory
// likes it, and transposed from the first-level cache.
template <bool kHalf>
void stage_as(const char* rows, int64_t stride_bytes, int64_t padded, Ahead ahead, char* column, float* lengths) {
  constexpr int64_t kChunkTiles = 8;
  constexpr int64_t kLinesPerTile = kHalf ? 1 : 2;
  alignas(64) char scratch[kTileRows * kChunkTiles * kLineBytes];
  const char* next = ahead.lines ? ahead.address : rows;
  const int64_t line = ahead.lines ? kLineBytes : 0;
  Vector squares[kTileRows];
  for (auto& s : squares) s = Vector::zero();
  for (int64_t first = 0; first < padded; first += kChunkTiles * kTileWidth) {
    const int64_t left = (padded - first + kTileWidth - 1) / kTileWidth,
                  tiles = left < kChunkTiles ? left : kChunkTiles;
    for (int i = 0; i < kTileRows; ++i)
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t l = 0; l < kLinesPerTile; ++l, next += line) _mm_prefetch(next, _MM_HINT_T1);
        const __m512i packed = line_of<kHalf>(rows + i * stride_bytes, first + t * kTileWidth, padded, squares[i].v);
        _mm512_store_si512(scratch + (i * kChunkTiles + t) * kLineBytes, packed);
      }
    for (int64_t t = 0; t < tiles; ++t, column += kPanelTiles * kTileBytes) {
      Vector pair[kTilePairs];
      for (int i = 0; i < kTileRows; ++i) pair[i].v = _mm512_load_ps(scratch + (i * kChunkTiles + t) * kLineBytes);
      Vector::transpose(pair);
      for (int p = 0; p < kTilePairs; ++p) pair[p].store(reinterpret_cast<float*>(column + p * kLineBytes));
    }
  }
  const __m512 growth = _mm512_set1_ps(1.0f + sum_error(padded));
  const __m512 length = _mm512_sqrt_ps(Vector::tree(squares).v);
  _mm512_storeu_ps(lengths, _mm512_fmadd_ps(length, growth, _mm512_set1_ps(kLeastLength)));
}

void stage(const void* rows, DType dtype, int64_t stride_bytes, int64_t padded, int column, Ahead ahead, void* panel,
           float* scales, float* lengths) {
  _mm512_storeu_ps(scales, _mm512_set1_ps(1.0f));
  const auto stage_rows = dtype == DType::kBFloat16 ? stage_as<true> : stage_as<false>;
  stage_rows(static_cast<const char*>(rows), stride_bytes, padded, ahead,
             static_cast<char*>(panel) + column / kTileRows * kTileBytes, lengths);
}

constexpr int kResultStride = kPanelRows * sizeof(float);

// Products of two query tiles (4 and 5) and two row tiles (6 and 7): 0 to 3.
void two_by_two(const char* rows, const char* query, int64_t tiles, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char* second = query + tiles * kTileBytes;
  for (int64_t t = 0; t < tiles; ++t, rows += kPanelTiles * kTileBytes) {
    _tile_loadd(6, rows, kLineBytes);
    _tile_loadd(4, query + t * kTileBytes, kLineBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, rows + kTileBytes, kLineBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second + t * kTileBytes, kLineBytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, kResultStride);
  _tile_stored(1, out + kTileRows, kResultStride);
  _tile_stored(2, out + kTileRows * kPanelRows, kResultStride);
  _tile_stored(3, out + kTileRows * kPanelRows + kTileRows, kResultStride);
}

// Products of one query tile (7) and four row tiles (4 to 6 in turns): 0 to 3.
void one_by_four(const char* rows, const char* query, int64_t tiles, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < tiles; ++t, rows += kPanelTiles * kTileBytes) {
    _tile_loadd(7, query + t * kTileBytes, kLineBytes);
    _tile_loadd(4, rows, kLineBytes);
    _tile_dpbf16ps(0, 7, 4);
    _tile_loadd(5, rows + kTileBytes, kLineBytes);
    _tile_dpbf16ps(1, 7, 5);
    _tile_loadd(6, rows + 2 * kTileBytes, kLineBytes);
    _tile_dpbf16ps(2, 7, 6);
    _tile_loadd(4, rows + 3 * kTileBytes, kLineBytes);
    _tile_dpbf16ps(3, 7, 4);
  }
  _tile_stored(0, out, kResultStride);
  _tile_stored(1, out + kTileRows, kResultStride);
  _tile_stored(2, out + 2 * kTileRows, kResultStride);
  _tile_stored(3, out + 3 * kTileRows, kResultStride);
}

void dots(const void* panel, const void* queries, int64_t count, int64_t padded, float* out) {
  const char* rows = static_cast<const char*>(panel);
  const char* query = static_cast<const char*>(queries);
  const int64_t tiles = (padded + kTileWidth - 1) / kTileWidth;
  for (int64_t first = 0; first < count; first += 2 * kTileRows) {
    if (count - first > kTileRows) {
      two_by_two(rows, query, tiles, out);
      two_by_two(rows + 2 * kTileBytes, query, tiles, out + 2 * kTileRows);
    } else {
      one_by_four(rows, query, tiles, out);
    }
    query += 2 * tiles * kTileBytes;
    out += 2 * kTileRows * kPanelRows;
  }
}

int64_t bytes_of(int64_t vectors, int64_t padded) {
  return (vectors + kTileRows - 1) / kTileRows * ((padded + kTileWidth - 1) / kTileWidth) * kTileBytes;
}

int64_t panel_bytes(int64_t padded) {
  return bytes_of(kPanelRows, padded);
}

}  // namespace

extern const CheapScore kAmxCheapScore = {kPanelRows,   kTileRows, kTileWidth, panel_bytes, bytes_of,
                                          pack_queries, stage,     dots,       enter,       leave};

}  // namespace urm
