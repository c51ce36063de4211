// Products of bytes on the integer tensor cores.
#pragma once

#include "warp.h"

namespace urm {

// d (16 x 8) += a (16 x 32, bytes with or without a sign) b (32 x 8, signed bytes): mma.m16n8k32 of the PTX manual,
// from sm_80 on. Registers 0 to 3 of a are row g, columns 4 t ..; row g + 8; row g, columns 16 + 4 t ..; row g + 8; of
// b column g, rows 4 t .. and 16 + 4 t ..; of d rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1, 2 t, 2 t + 1 (g =
// lane / 4, t = lane % 4).
template <bool kSigned>
__device__ __forceinline__ void multiply_bytes(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(URM_SIMT)
  const uint32_t b[2] = {b0, b1};
  if (kSigned) urm_simt::multiply_bytes<int8_t>(d, a, b);
  else urm_simt::multiply_bytes<uint8_t>(d, a, b);
#else
  if constexpr (kSigned)
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// z + the four products of signed bytes.
__device__ __forceinline__ int32_t add_products(uint32_t x, uint32_t y, int32_t z) {
#if defined(URM_SIMT)
  for (int i = 0; i < 4; ++i) z += static_cast<int8_t>(x >> 8 * i) * static_cast<int8_t>(y >> 8 * i);
  return z;
#else
  return __dp4a(static_cast<int>(x), static_cast<int>(y), z);
#endif
}

// Not below the integer.
__device__ __forceinline__ float float_not_below(int32_t x) {
#if defined(URM_SIMT)
  const float nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? nextafterf(nearest, HUGE_VALF) : nearest;
#else
  return __int2float_ru(x);
#endif
}

}  // namespace urm
