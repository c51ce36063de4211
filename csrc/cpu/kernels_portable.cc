// Plain C++ for any machine: std::fma on each of the 16 running sums. The specification in code; slow where the
// processor has no fused multiply-add in its base instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../common/canonical_dot.h"
#include "../common/log_sum_exp.h"
#include "kernels.h"

namespace urm {

extern const CodeSums kPortableCodeSums;

namespace {

float widen_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu, fraction = half & 0x3FFu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
  }
  const uint32_t bits = sign | (exponent == 0x1Fu ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

float widen_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

// As the processors' conversions: what does not fit becomes the least integer.
int32_t to_integer(float x) {
  return std::fabs(x) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(x)) : INT32_MIN;
}

struct Vector {
  static constexpr int kPanelBlocks = 1;
  static constexpr int kRowsAtOnce = 1;
  static constexpr int kChains = 4;  // of the measured ceiling: what registers hold

  float v[kLanes];

  template <class F>
  static Vector each(F f) {
    Vector out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
  }
  template <class F>
  static uint32_t mask(F f) {
    uint32_t out = 0;
    for (int i = 0; i < kLanes; ++i) out |= static_cast<uint32_t>(f(i)) << i;
    return out;
  }

  static Vector zero() { return broadcast(0.0f); }
  static Vector load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static Vector broadcast(float x) {
    return each([&](int) { return x; });
  }
  static Vector fma(const Vector& x, const Vector& y, const Vector& z) {
    return each([&](int i) { return fused_multiply_add(x.v[i], y.v[i], z.v[i]); });
  }
  static Vector multiply(const Vector& x, const Vector& y) {
    return each([&](int i) { return x.v[i] * y.v[i]; });
  }
  static Vector divide(const Vector& x, const Vector& y) {
    return each([&](int i) { return x.v[i] / y.v[i]; });
  }
  static Vector round(const Vector& x) {
    return each([&](int i) { return std::nearbyint(x.v[i]); });
  }
  static Vector add(const Vector& x, const Vector& y) {
    return each([&](int i) { return x.v[i] + y.v[i]; });
  }
  static Vector max(const Vector& x, const Vector& y) {
    return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
  }
  static Vector abs(const Vector& x) {
    return each([&](int i) { return std::fabs(x.v[i]); });
  }
  static uint32_t unordered(const Vector& x) {
    return mask([&](int i) { return x.v[i] != x.v[i]; });
  }
  static uint32_t less(const Vector& x, const Vector& y) {
    return mask([&](int i) { return x.v[i] < y.v[i]; });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  static Vector select_less(const Vector& x, const Vector& y, const Vector& a, const Vector& b) {
    return each([&](int i) { return x.v[i] < y.v[i] ? a.v[i] : b.v[i]; });
  }
  static Vector power_of_two(const Vector& n) {
    return each([&](int i) { return std::ldexp(1.0f, std::clamp(to_integer(n.v[i]), -126, 127)); });
  }
  static uint32_t lanes_of_group(const int32_t* exponents, int32_t group) {
    return mask([&](int i) { return exponents[i] >> kGroupBits == group; });
  }
  static void add_shifted(const int32_t* exponents, const uint32_t* mantissas, uint32_t lanes, uint64_t* sums) {
    for (int i = 0; i < kLanes; ++i)
      if (lanes >> i & 1) sums[i] += static_cast<uint64_t>(mantissas[i]) << (exponents[i] & (kGroupExponents - 1));
  }
  static Vector from_integers(const int32_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  void store_integers(int32_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = to_integer(v[i]);
  }

  static Vector widen(const char* row, DType dtype, int64_t e) {
    return each([&](int i) { return widen_one(row, dtype, e + i); });
  }
  static float widen_one(const char* row, DType dtype, int64_t e) {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row)[e];
    if (dtype == DType::kFloat8)
      return widen_half(half_of_float8(reinterpret_cast<const uint8_t*>(row)[e])) * kHalfToFloat8;
    const uint16_t half = reinterpret_cast<const uint16_t*>(row)[e];
    return dtype == DType::kFloat16 ? widen_half(half) : widen_bfloat16(half);
  }

  static Vector tree(Vector* sum) {
    return each([&](int i) { return canonical_tree(sum[i].v); });
  }
  static void transpose(Vector* row) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        const float swap = row[i].v[j];
        row[i].v[j] = row[j].v[i];
        row[j].v[i] = swap;
      }
  }
};

#include "kernels_template.h"

}  // namespace

extern const Kernels kPortableKernels = KernelsOf<Vector>::table("portable", &kPortableCodeSums);

}  // namespace urm
