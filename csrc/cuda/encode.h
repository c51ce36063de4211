// Codes of rows, with the bits that the CPU makes (csrc/cpu/kernels_codes.h): four lanes share a row, each with one of
// the four running sums of every sum over elements.
#pragma once

#include "rotate.h"
#include "rows.h"

namespace urm {

constexpr int kRowLanes = kCodeSums;

// Floats between rows in shared memory: neighbouring rows begin four banks apart.
__device__ inline int encode_stride(int64_t r) {
  return static_cast<int>((r + 31) / 32 * 32 + kRowLanes);
}

__device__ inline float sum_of_row(float sum) {
  sum += __shfl_xor_sync(kAllLanes, sum, 2);
  return sum + __shfl_xor_sync(kAllLanes, sum, 1);
}

__device__ inline float largest_of_row(const float* x, int lane, int r) {
  float largest = 0.0f;
  for (int e = lane; e < r; e += kRowLanes) largest = fabsf(x[e]) > largest ? fabsf(x[e]) : largest;
  for (int apart = 1; apart < kRowLanes; apart *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, largest, apart);
    largest = other > largest ? other : largest;
  }
  return largest;
}

__device__ inline float code_of(float x, float inverse, int bits) {
  const float most = static_cast<float>(largest_code(bits)), near = x * inverse;
  const float code = bits == 2 ? rintf(near * 0.5f - 0.5f) * 2.0f + 1.0f : rintf(near),
              least = most < code ? most : code;
  return least > -most ? least : -most;
}

struct RowCode {
  float inverse;  // code_of's
  int bits;
  RowSide side;
  bool kept;
};

// x is the rotated row, brought to [1, 2) by `exponent`.
__device__ inline RowCode encode_row(const float* x, int lane, int r, float largest_before, float largest,
                                     RowExponent exponent, int bits) {
  float squares = 0.0f, dot = 0.0f, length = 0.0f;
  for (int e = lane; e < r; e += kRowLanes) squares = fused_multiply_add(x[e], x[e], squares);
  squares = sum_of_row(squares);
  const auto sum_both = [&](float inverse) {
    dot = length = 0.0f;
    for (int e = lane; e < r; e += kRowLanes) {
      const float code = code_of(x[e], inverse, bits);
      dot = fused_multiply_add(x[e], code, dot);
      length = fused_multiply_add(code, code, length);
    }
    dot = sum_of_row(dot);
    length = sum_of_row(length);
  };
  float best = -1.0f, inverse = 0.0f;
  for (int clip = 0; clip < clips_of(bits); ++clip) {
    const float factor = 1.0f / (largest * clip_of(clip, bits));
    sum_both(factor);
    const float quality = dot * dot / length;
    if (best < quality) {
      best = quality;
      inverse = factor;
    }
  }
  sum_both(inverse);
  const float scale = squares / dot;
  float rest = 0.0f;
  for (int e = lane; e < r; e += kRowLanes) {
    const float lost = fused_multiply_add(-scale, code_of(x[e], inverse, bits), x[e]);
    rest = fused_multiply_add(lost, lost, rest);
  }
  const EncodedSide made = encoded_side(largest_before, exponent, squares, sum_of_row(rest), scale, r, bits);
  return {inverse, bits, made.side, made.kept};
}

// Codes + offset of a quad, one byte a lane, in all four lanes of the row.
__device__ inline uint32_t quad_of_row(const float* x, int lane, int r, const RowCode& row, int quad) {
  const int e = quad * kQuad + lane;
  const int code = row.kept && e < r ? static_cast<int>(code_of(x[e], row.inverse, row.bits)) : no_code(row.bits);
  uint32_t word = static_cast<uint32_t>(code + code_offset(row.bits)) << 8 * lane;
  word |= __shfl_xor_sync(kAllLanes, word, 1);
  return word | __shfl_xor_sync(kAllLanes, word, 2);
}

// By halves, at whose multiples fine codes of 4 bits lie.
__device__ inline void write_side(unsigned char* scale, unsigned char* lost, unsigned char* norm, const RowSide& side) {
  uint32_t scale_bits;
  memcpy(&scale_bits, &side.scale, sizeof scale_bits);
  reinterpret_cast<uint16_t*>(scale)[0] = static_cast<uint16_t>(scale_bits);
  reinterpret_cast<uint16_t*>(scale)[1] = static_cast<uint16_t>(scale_bits >> 16);
  *reinterpret_cast<uint16_t*>(lost) = side.lost;
  *reinterpret_cast<uint16_t*>(norm) = side.norm;
}

// Writes codes of the table's rows: of all whole blocks where `rows` is null, else item i is the new content of
// rows[i], ascending. A warp has rows_at_once (8 or 2) rows, half of them 16 behind the others, with which they share
// bytes. blocks [blocks_count], fine [rows] or null.
//
// Shared memory: rows_at_once encode_stride(r) floats a warp.
__global__ void encode_rows(Table table, Rotation rotation, int64_t bits_wanted, unsigned char* blocks,
                            int64_t blocks_count, unsigned char* fine, const int64_t* rows, int64_t rows_at_once) {
  URM_DYNAMIC_SHARED(shared);
  const int r = static_cast<int>(table.r), at_once = static_cast<int>(rows_at_once), half = at_once / 2;
  const int stride = encode_stride(r), quads = static_cast<int>(quads_of(r)), bits = static_cast<int>(bits_wanted);
  float* own = reinterpret_cast<float*>(shared) + warp_of_block() * at_once * stride;
  const int lane = lane_of_warp() % kRowLanes, slot = lane_of_warp() / kRowLanes;
  const int64_t coded = blocks_count * kBlockRows, tasks_of_block = kBlockRows / at_once;
  const int64_t tasks = rows ? (table.rows + at_once - 1) / at_once : blocks_count * tasks_of_block;
  for (int64_t task = warp_of_grid(); task < tasks; task += warps_of_grid()) {
    const auto item_of = [=](int s) {
      if (rows) return task * at_once + s;
      const int64_t in_block = task % tasks_of_block * half + s % half + (s < half ? 0 : kBlockRows / 2);
      return task / tasks_of_block * kBlockRows + in_block;
    };
    const int64_t item = item_of(slot);
    const bool live = slot < at_once && item < table.rows;
    const int64_t row = live && rows ? rows[item] : item;
    for (int s = 0; s < at_once; ++s) {
      const int64_t from = item_of(s);
      for (int e = lane_of_warp(); e < r; e += kWarp)
        own[s * stride + e] = from < table.rows ? element_of(table, from, e) : 0.0f;
    }
    __syncwarp();
    // Lanes without a row of their own follow the first one's, and write nothing.
    float* x = own + (slot < at_once ? slot : 0) * stride;
    const bool works = slot < at_once;
    float before = largest_of_row(x, lane, r);
    if (table.row_scale.data) {
      const float scale = live ? value_of(table.row_scale, item) : 1.0f, as_it_lies = before;
      if (works)
        for (int e = lane; e < r; e += kRowLanes) x[e] *= scale;
      __syncwarp();
      before = largest_of_row(x, lane, r);
      if (works && lane == 0 && scale_is_hazardous(as_it_lies, before, scale)) x[0] = float_of_bits(0x7FC00000u);
      __syncwarp();
    }
    if (at_once * kRowLanes == kWarp) rotate<kRowLanes>(rotation, lane, x);
    else
      for (int s = 0; s < at_once; ++s) rotate<kWarp>(rotation, lane_of_warp(), own + s * stride);
    const float largest = largest_of_row(x, lane, r);
    const RowExponent exponent = row_exponent(largest);
    __syncwarp();
    if (works)
      for (int e = lane; e < r; e += kRowLanes) x[e] *= exponent.inverse;
    __syncwarp();
    const bool writes = live && row < coded;
    if (fine) {
      const RowCode code = encode_row(x, lane, r, before, largest * exponent.inverse, exponent, fine_bits(bits));
      unsigned char* out = fine + row * fine_row_bytes(r, bits);
      for (int quad = 0; quad < quads; ++quad) {
        const uint32_t word = quad_of_row(x, lane, r, code, quad);
        if (!writes || lane != quad % kRowLanes) continue;
        if (code.bits == 4) *reinterpret_cast<uint16_t*>(out + quad * 2) = packed_quad(word);
        else *reinterpret_cast<uint32_t*>(out + quad * kQuad) = word;
      }
      out += fine_code_bytes(r, bits);
      if (writes && lane == 0) write_side(out, out + 4, out + 6, code.side);
    }
    const RowCode code = encode_row(x, lane, r, before, largest * exponent.inverse, exponent, bits);
    unsigned char* block = blocks + row / kBlockRows * block_bytes(r, bits);
    const int64_t in_block = row % kBlockRows;
    uint32_t even = 0;  // of 2 bits: the quad before, with which this one shares bytes
    for (int quad = 0; quad < quads; ++quad) {
      uint32_t word = quad_of_row(x, lane, r, code, quad);
      uint32_t* place = reinterpret_cast<uint32_t*>(block + code_place(in_block, quad * kQuad, bits));
      const bool own_quad = writes && lane == quad % kRowLanes;
      if (bits == 2) word >>= 1;  // c + 3 is twice what is stored
      if (bits == 8) {
        if (own_quad) *place = word;
      } else if (rows) {
        const int shift = code_shift(in_block, quad * kQuad, bits);
        if (own_quad) {
          atomicAnd(place, ~((bits == 2 ? 0x03030303u : 0x0F0F0F0Fu) << shift));
          atomicOr(place, word << shift);
        }
      } else {
        word |= __shfl_xor_sync(kAllLanes, word, half * kRowLanes) << bits;
        if (bits == 2) even = word = quad % 2 ? even | word << 4 : word;
        const bool whole = bits == 4 || quad % 2 || quad + 1 == quads;
        if (own_quad && slot < half && whole) *place = word;
      }
    }
    if (writes && lane == 0) {
      unsigned char* side = block + block_code_bytes(r, bits);
      write_side(side + in_block * 4, side + kBlockRows * 4 + in_block * 2, side + kBlockRows * 6 + in_block * 2,
                 code.side);
    }
    __syncwarp();
  }
}

}  // namespace urm
