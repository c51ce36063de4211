// Codes: low-bit copies of rows, small enough to be read for every item, from which a certain upper bound of every
// canonical dot follows (docs/design.md has the proof).
//
// A row x, rotated to w, has integers c (|c| <= 7 or 127; of 2 bits -3, -1, 1 or 3), a scale a, and lengths relative to
// it: lost e >= |w / a - c|, norm n >= |x| / a. A rotated query has integers u with a step b that the user's queries
// share, kept g >= |b u|, lost f >= |rotated q - b u|. Then
//
//   dot <= a (b (u . c) + g e + f n + code_error (g + f) n) + kCodeUnderflow
//
// Rows lie in blocks of 32. A *quad* is four neighbouring elements, whose products a 32-bit lane adds at once:
//
//   2 bits:  [two quads][row 0..15][element of a quad] bytes of (c + 3) / 2: the first quad of rows 0..15 in bits 0 and
//            1, of rows 16..31 in bits 2 and 3, the second quad likewise above
//   4 bits:  [quad][row 0..15][element of the quad] bytes c + 8, the codes of rows 16..31 in their high halves
//   8 bits:  [quad][row 0..31][element of the quad] bytes c + 128
//   then     32 scales (float), 32 lost (half), 32 norms (half)
//
// A row that may hold anything has n = +inf: its bound is +inf. A zero row has n = e = 0 and codes 0; 2 bits have no
// 0, and there its scale is 0 instead. Rows behind the last whole block have no codes.
// Fine codes lie row by row: codes, scale, lost, norm. Beside 4 bits they have 8, [quads][4] bytes c + 128; beside 2
// bits they have 4, [quads][2] bytes of elements 0 and 1, c + 8, with 2 and 3 in the high halves.
#pragma once

#include "canonical_dot.h"

namespace urm {

constexpr int kBlockRows = 32;
constexpr int kQuad = 4;
constexpr int64_t kSideBytes = 8;               // of a row: scale, lost, norm
constexpr int64_t kWidestCodedRow = 8192;       // up to here sums of products fit 32 bits, also with those of two rows
constexpr float kLargestCodedLength = 0x1p60f;  // of rows and queries: no product of two overflows
constexpr float kLeastCodeScale = 0x1p-100f;    // of rows and queries: no product of integers underflows
// The largest element of a row that has a scale: up to the first its dots do not overflow; from the second on scales
// above 1 enlarge what dots lose by underflow to less than code_error (the longest query is above 127 * 2^-100).
constexpr float kLargestScaledElement = 0x1p50f;
constexpr float kLeastScaledElement = 0x1p-20f;

constexpr uint16_t kHalfInfinity = 0x7C00;

URM_HOST_DEVICE int64_t quads_of(int64_t r) {
  return (r + kQuad - 1) / kQuad;
}

URM_HOST_DEVICE int64_t block_code_bytes(int64_t r, int bits) {
  const int64_t quads = bits == 2 ? (quads_of(r) + 1) / 2 * 2 : quads_of(r);
  return quads * kQuad * kBlockRows * bits / 8;
}

URM_HOST_DEVICE int64_t block_bytes(int64_t r, int bits) {
  return block_code_bytes(r, bits) + kBlockRows * kSideBytes;
}

// Of the codes beside those of `bits`.
URM_HOST_DEVICE int fine_bits(int bits) {
  return bits == 2 ? 4 : 8;
}

URM_HOST_DEVICE int64_t fine_code_bytes(int64_t r, int bits) {
  return quads_of(r) * kQuad * fine_bits(bits) / 8;
}

URM_HOST_DEVICE int64_t fine_row_bytes(int64_t r, int bits) {
  return fine_code_bytes(r, bits) + kSideBytes;
}

URM_HOST_DEVICE int largest_code(int bits) {
  return bits == 2 ? 3 : bits == 4 ? 7 : 127;
}

// Added to codes, so that they are unsigned.
URM_HOST_DEVICE int code_offset(int bits) {
  return bits == 2 ? 3 : bits == 4 ? 8 : 128;
}

// Of one row, from the part of a block behind its codes. Blocks of a mapped file may lie anywhere, so nothing is read
// in place.
struct RowSide {
  float scale;
  uint16_t lost, norm;
};

URM_HOST_DEVICE RowSide side_of_row(const char* block, int64_t code_bytes, int64_t row) {
  const char* side = block + code_bytes;
  RowSide out;
  memcpy(&out.scale, side + row * 4, sizeof out.scale);
  memcpy(&out.lost, side + kBlockRows * 4 + row * 2, sizeof out.lost);
  memcpy(&out.norm, side + kBlockRows * 6 + row * 2, sizeof out.norm);
  return out;
}

// Byte of a block that holds element e of a row, and the lowest of its bits there.
URM_HOST_DEVICE int64_t code_place(int64_t row, int64_t e, int bits) {
  const int64_t lanes = bits == 8 ? kBlockRows : kLanes, quad = bits == 2 ? e / kQuad / 2 : e / kQuad;
  return (quad * lanes + row % lanes) * kQuad + e % kQuad;
}

URM_HOST_DEVICE int code_shift(int64_t row, int64_t e, int bits) {
  const int half = row < kLanes ? 0 : 1;
  return bits == 8 ? 0 : bits == 4 ? 4 * half : 2 * half + 4 * static_cast<int>(e / kQuad % 2);
}

// Roundings, as a share of (g + f) n a: of the canonical dot, of the rotation of row and query, of the bound itself.
URM_HOST_DEVICE float code_error(int64_t r, int64_t rotation_roundings) {
  return static_cast<float>(r / kLanes + 2 * rotation_roundings + 64) * 0x1p-24f;
}

// What the canonical dot and the bound may lose where they underflow is (r + 16) 2^-149 at most. A normal number:
// adding a denormal one costs some processors a hundred cycles, for every 16 rows.
constexpr float kCodeUnderflow = 0x1p-126f;

// The least half that is not below x >= 0; +inf above 65504.
URM_HOST_DEVICE uint16_t half_not_below(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x > 65504.0f) return kHalfInfinity;
  if (x < 0x1p-14f) {  // denormal halves are multiples of 2^-24
    const float units = x * 0x1p24f;
    const uint16_t whole = static_cast<uint16_t>(units);
    return static_cast<uint16_t>(whole + (static_cast<float>(whole) < units));
  }
  const uint32_t rounded = bits + 0x1FFF;  // up to a multiple of 2^13 in the last place; a carry raises the exponent
  return static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

URM_HOST_DEVICE float value_of_half(uint16_t half) {
  const uint32_t exponent = half >> 10 & 0x1F, fraction = half & 0x3FF;
  if (exponent == 0) return static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t bits = (exponent == 0x1F ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Scales tried: of 4-bit codes the largest element becomes 1, 15/16, ... 10/16 of the largest code; of 2-bit codes the
// step is 14/48, 13/48, ... 6/48 of the largest element, which for normal elements is best between r = 8 and beyond
// 8192.
constexpr int kClips = 7, kClipsOfTwoBits = 9;
constexpr int kCodeSums =
    4;  // running sums of a sum over elements: element e goes to e % 4, (0 + 2) + (1 + 3) in the end

URM_HOST_DEVICE int clips_of(int bits) {
  return bits == 2 ? kClipsOfTwoBits : bits == 4 ? kClips : 1;
}

URM_HOST_DEVICE float clip_of(int clip, int bits) {
  return static_cast<float>((bits == 2 ? 14 : 16) - clip) / (16.0f * static_cast<float>(largest_code(bits)));
}

// A rotated row is brought to [1, 2) by a power of two before it is encoded: for what is too small or too large, there
// is none.
struct RowExponent {
  float power, inverse;
  bool ordinary;
};

URM_HOST_DEVICE RowExponent row_exponent(float largest) {
  RowExponent out{1.0f, 0.0f, largest >= kLeastCodeScale && largest <= kLargestCodedLength};
  if (!out.ordinary) return out;
  uint32_t bits;
  memcpy(&bits, &largest, sizeof bits);
  bits &= 0x7F800000u;
  memcpy(&out.power, &bits, sizeof bits);
  bits = (254u << 23) - bits;
  memcpy(&out.inverse, &bits, sizeof bits);
  return out;
}

// What is kept beside a row's codes, and whether these are kept: a row that may hold anything has none.
struct EncodedSide {
  RowSide side;
  bool kept;
};

// largest: of the row before its rotation; squares, rest: of the rotated row and of what its codes lost, brought to
// [1, 2) as above; scale: of the codes.
URM_HOST_DEVICE EncodedSide encoded_side(float largest, RowExponent exponent, float squares, float rest, float scale,
                                         int64_t r, int bits) {
  const float growth = 1.0f + static_cast<float>(3 * r + 64) * 0x1p-24f;  // for the roundings of the two lengths
  const float lost = sqrtf(rest) / scale * growth, norm = sqrtf(squares) / scale * growth;
  const float a = scale * exponent.power;
  if (largest == 0.0f && squares == 0.0f) return {{bits == 2 ? 0.0f : 1.0f, 0, 0}, false};
  if (exponent.ordinary && a >= kLeastCodeScale && a * norm <= kLargestCodedLength && lost <= norm)
    return {{a, half_not_below(lost), half_not_below(norm)}, true};
  return {{1.0f, 0, kHalfInfinity}, false};
}

// Of a scaled row, whose dots are formed with the row as it lies and scaled then: where these may overflow, lose more
// by underflow than the bound allows for, or outlive a scaled row that vanishes, the row may hold anything. before,
// after: the largest element as it lies and scaled.
URM_HOST_DEVICE bool scale_is_hazardous(float before, float after, float scale) {
  const bool vanished = after == 0.0f && before > 0.0f && scale != 0.0f;
  const bool enlarges = before > 0.0f && before < kLeastScaledElement && fabsf(scale) > 1.0f;
  return vanished || enlarges || before > kLargestScaledElement;
}

// Codes of rows that have none, and past the end of a row: 0, or what is next to it.
URM_HOST_DEVICE int no_code(int bits) {
  return bits == 2 ? 1 : 0;
}

// Codes + offset of one row of a block of 4 or 8 bits, [quads][4].
URM_HOST_DEVICE void row_of_block(const char* block, int64_t row, int64_t r, int bits, uint8_t* out) {
  for (int64_t q = 0; q < quads_of(r); ++q, out += kQuad) {
    uint32_t quad;
    memcpy(&quad, block + code_place(row, q * kQuad, bits), sizeof quad);
    if (bits == 4) quad = quad >> code_shift(row, q * kQuad, bits) & 0x0F0F0F0Fu;
    memcpy(out, &quad, sizeof quad);
  }
}

// A quad of bytes c + 8 in two bytes, and back.
URM_HOST_DEVICE uint16_t packed_quad(uint32_t quad) {
  return static_cast<uint16_t>((quad & 0x0F0Fu) | (quad >> 12 & 0xF0F0u));
}

URM_HOST_DEVICE uint32_t unpacked_quad(uint16_t pair) {
  return (pair & 0x0F0Fu) | (pair & 0xF0F0u) << 12;
}

}  // namespace urm
