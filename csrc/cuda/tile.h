// A tile of 64 rows, two blocks of codes, on its way from memory to the tensor cores.
//
// A load of 16 bytes has one quad of
// four neighbouring rows; it is at once an operand of four products, one for each of these rows (j = 0..3):
//
//   4 bits: lanes 4 g + t load quad t of rows 4 (g % 4) + j of block g / 4, and in the high halves of rows 16 + ...;
//   the
//           low halves are the operand's rows g, the high ones its rows g + 8. High halves are not shifted down: their
//           products are sixteen times as large, as their starts are.
//   2 bits: lanes 4 g + t load two quads of rows 4 (g % 4) + j and 16 + ...; the rows' halves as above, two bits apart
//           instead of four, and the second quad, four bits above, for the operand's second word.
//   8 bits: quad t of rows 4 g + j, of the first block for the operand's rows g, of the second for its rows g + 8.
//
// Quads 8 s + t and 8 s + 4 + t belong to step s; under 2 bits 8 s + 2 t and the one behind it. Which element a place
// of the operand has does not matter, as long as the queries' codes agree: fragments uint4 [columns / 8][steps /
// 2][lane] hold for two steps the two words of column lane / 4. Quads behind the last are the last one again, with
// codes of zero on the queries' side.
#pragma once

#include "mma.h"
#include "queries.h"

namespace urm {

constexpr int kTileBlocks = 2, kRowsOfTile = kTileBlocks * kBlockRows;
constexpr int kProducts = 4;  // of a step: the rows of a load
constexpr int kCellBits = 4;  // of the codes of cells
constexpr int kColumns = 8;   // of a product

__device__ inline int64_t tiles_of(const Codes& codes) {
  return (codes.count + kTileBlocks - 1) / kTileBlocks;
}

// Place in the tile of the row whose sum is in register 2 `half` or 2 `half` + 1 of product j.
template <int kBits>
__device__ __forceinline__ int row_of_sum(int g, int j, int half) {
  return kBits < 8 ? kBlockRows * (g / 4) + kBlockRows / 2 * half + 4 * (g % 4) + j : kBlockRows * half + 4 * g + j;
}

template <int kBits>
constexpr int kLoads = kBits / 2;  // of a step

// What sums of rows 16..31 of a block are times what those of rows 0..15 are.
template <int kBits>
constexpr int kHigh = kBits == 8 ? 1 : 1 << kBits;

// Loads of step s: quads 8 s + t (of both blocks in turns under 8 bits), then 8 s + 4 + t; of 2 bits both at once.
template <int kBits>
__device__ __forceinline__ void load_step(const Codes& codes, int64_t r, int64_t tile, int step, uint4* loads) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  const int64_t last_quad = kBits == 2 ? (quads_of(r) - 1) / 2 : quads_of(r) - 1, last_block = codes.count - 1;
#pragma unroll
  for (int i = 0; i < kLoads<kBits>; ++i) {
    const int64_t which = kBits < 8 ? g / 4 : i % 2, high = kBits == 4 ? i : i / 2;
    const int64_t wanted = tile * kTileBlocks + which, quad = (kBits == 2 ? 4 : 8) * step + 4 * high + t;
    const int64_t block = wanted < last_block ? wanted : last_block;
    const int64_t place = (quad < last_quad ? quad : last_quad) * (kBits < 8 ? 64 : 128) + 16 * (kBits < 8 ? g % 4 : g);
    loads[i] = __ldg(reinterpret_cast<const uint4*>(codes.blocks + block * block_bytes(r, kBits) + place));
  }
}

template <int kBits>
__device__ __forceinline__ void operands_of(const uint4* loads, uint32_t (&a)[kProducts][4]) {
  const auto words = [](const uint4& x, uint32_t (&out)[4]) { out[0] = x.x, out[1] = x.y, out[2] = x.z, out[3] = x.w; };
  uint32_t from[4][4];
#pragma unroll
  for (int i = 0; i < kLoads<kBits>; ++i) words(loads[i], from[i]);
#pragma unroll
  for (int j = 0; j < kProducts; ++j) {
    if (kBits == 2) {
      a[j][0] = from[0][j] & 0x03030303u;
      a[j][1] = from[0][j] & 0x0C0C0C0Cu;
      a[j][2] = from[0][j] >> 4 & 0x03030303u;
      a[j][3] = from[0][j] >> 4 & 0x0C0C0C0Cu;
    } else if (kBits == 4) {
      a[j][0] = from[0][j] & 0x0F0F0F0Fu;
      a[j][1] = from[0][j] & 0xF0F0F0F0u;
      a[j][2] = from[1][j] & 0x0F0F0F0Fu;
      a[j][3] = from[1][j] & 0xF0F0F0F0u;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = from[i][j] ^ 0x80808080u;  // c, without its offset
    }
  }
}

// Hands out the sums of users with one query each; `user` is the first of the product. Calls use.take<pairs of a
// lane>(sum, row, user), three functions of a pair's number.
template <int kBits, class Use>
__device__ __forceinline__ void sums_of_users(const int32_t (&sums)[kProducts][4], int user, const Use& use) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
  use.template take<4 * kProducts>([&](int i) { return sums[i / 4][i % 4]; },
                                   [=](int i) { return row_of_sum<kBits>(g, i / 4, i / 2 % 2); },
                                   [=](int i) { return user + 2 * t + i % 2; });
}

// The same of the largest of a user's sums in this lane's columns: one lane has all of them where the width is 2, else
// two or four lanes share them, and each ends with the rows of two products, or with one half of these.
template <int kBits, class Use>
__device__ __forceinline__ void largest_sums(const int32_t (&largest)[kProducts][2], int user, int64_t width,
                                             const Use& use) {
  const int g = lane_of_warp() / 4, t = lane_of_warp() % 4, upper = t & 1, half = t / 2;
  if (width == 2)
    return use.template take<2 * kProducts>([&](int i) { return largest[i / 2][i % 2]; },
                                            [=](int i) { return row_of_sum<kBits>(g, i / 2, i % 2); },
                                            [=](int) { return user + t; });
  int32_t two[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t keeps = upper ? largest[2 + i / 2][i % 2] : largest[i / 2][i % 2];
    const int32_t hands = upper ? largest[i / 2][i % 2] : largest[2 + i / 2][i % 2];
    const int32_t other = __shfl_xor_sync(kAllLanes, hands, 1);
    two[i / 2][i % 2] = keeps > other ? keeps : other;
  }
  if (width == 4)
    return use.template take<4>([&](int i) { return two[i / 2][i % 2]; },
                                [=](int i) { return row_of_sum<kBits>(g, 2 * upper + i / 2, i % 2); },
                                [=](int) { return user + half; });
  int32_t one[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t keeps = half ? two[i][1] : two[i][0], hands = half ? two[i][0] : two[i][1];
    const int32_t other = __shfl_xor_sync(kAllLanes, hands, 2);
    one[i] = keeps > other ? keeps : other;
  }
  use.template take<2>([&](int i) { return one[i]; }, [=](int i) { return row_of_sum<kBits>(g, 2 * upper + i, half); },
                       [=](int) { return user; });
}

// The one or the other; the largest sums are looked at where users have several queries.
template <int kBits, bool kSingle, class Use>
__device__ __forceinline__ void hand_out(const int32_t (&sums)[kProducts][4], const int32_t (&largest)[kProducts][2],
                                         int user, int64_t width, const Use& use) {
  if constexpr (kSingle) sums_of_users<kBits>(sums, user, use);
  else largest_sums<kBits>(largest, user, width, use);
}

}  // namespace urm
