// The innermost loops of log_partition and its gradient, over a vector type V of 16 floats; part of kernels_template.h,
// whose rules hold here, too.
#pragma once

template <class V>
struct KernelsOf;

template <class V>
struct PartitionKernelsOf {
  // minus_logarithms and exp_polynomial of log_sum_exp.h.
  static V remainder_of(V x, V n) {
    return V::fma(n, V::broadcast(2.12194440e-4f), V::fma(n, V::broadcast(-0.693359375f), x));
  }

  static V exp_polynomial_of(V f) {
    V p = V::broadcast(1.98412698e-4f);
    p = V::fma(p, f, V::broadcast(1.38888889e-3f));
    p = V::fma(p, f, V::broadcast(8.33333333e-3f));
    p = V::fma(p, f, V::broadcast(4.16666667e-2f));
    p = V::fma(p, f, V::broadcast(1.66666667e-1f));
    p = V::fma(p, f, V::broadcast(0.5f));
    p = V::fma(p, f, V::broadcast(1.0f));
    return V::fma(p, f, V::broadcast(1.0f));
  }

  // exp(x) for x up to about 80; meaningless below kExpFloor.
  static V exp_of(V x) {
    const V n = V::round(V::multiply(x, V::broadcast(kLog2E)));
    return V::multiply(exp_polynomial_of(remainder_of(x, n)), V::power_of_two(n));
  }

  static uint32_t finish_shares(V score, uint32_t nan, const float* bias, float temperature, float logarithm,
                                float factor, uint32_t lanes, float* scores, float* shares) {
    if (bias) score = V::add(score, V::load(bias));
    if (temperature != 1.0f) score = V::divide(score, V::broadcast(temperature));
    nan |= V::unordered(score);
    score.store(scores);
    const V x = V::add(score, V::broadcast(-logarithm));
    V::multiply(exp_of(x), V::broadcast(factor)).store(shares);
    return lanes & ~(nan | V::less(x, V::broadcast(kExpFloor)));
  }

  static uint32_t shares_max(const float* dots, int64_t stride, int64_t count, const float* bias, float temperature,
                             float logarithm, float factor, uint32_t lanes, float* scores, float* shares,
                             int32_t* winners) {
    V largest = V::load(dots), winner = V::zero();
    uint32_t nan = V::unordered(largest);
    for (int64_t m = 1; m < count; ++m) {
      const V d = V::load(dots + m * stride);
      nan |= V::unordered(d);
      winner = V::select_less(largest, d, V::broadcast(static_cast<float>(m)), winner);
      largest = V::max(d, largest);
    }
    winner.store_integers(winners);
    return finish_shares(largest, nan, bias, temperature, logarithm, factor, lanes, scores, shares);
  }

  static uint32_t shares_log_sum_exp(const float* dots, int64_t stride, int64_t count, const float* bias,
                                     float temperature, float logarithm, float factor, uint32_t lanes, float* scores,
                                     float* shares, float* weights) {
    uint32_t nan;
    const V largest = KernelsOf<V>::largest_of(dots, stride, count, &nan);
    V total = V::zero();
    for (int64_t m = 0; m < count; ++m) {
      const V x = V::add(V::load(dots + m * stride), V::multiply(largest, V::broadcast(-1.0f)));
      const V weight = V::select_less(x, V::broadcast(kExpFloor), V::zero(), exp_of(x));
      weight.store(weights + m * kLanes);
      total = V::add(total, weight);
    }
    for (int64_t m = 0; m < count; ++m) V::divide(V::load(weights + m * kLanes), total).store(weights + m * kLanes);
    float score[kLanes];
    for (int i = 0; i < kLanes; ++i) score[i] = lanes >> i & 1 ? canonical_log_sum_exp(dots + i, stride, count) : 0.0f;
    return finish_shares(V::load(score), nan, bias, temperature, logarithm, factor, lanes, scores, shares);
  }

  template <int Vectors>
  static void add_products_sized(const float* row, const float* queries, int64_t padded, const int32_t* chosen,
                                 const float* factors, int64_t count, float* block, float* sum) {
    V x[Vectors], total[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      x[v] = V::load(row + v * kLanes);
      total[v] = V::zero();
    }
    for (int64_t j = 0; j < count; ++j) {
      const V factor = V::broadcast(factors[j]);
      const float* query = queries + chosen[j] * padded;
      float* target = block + chosen[j] * padded;
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        total[v] = V::fma(factor, V::load(query + v * kLanes), total[v]);
        V::fma(factor, x[v], V::load(target + v * kLanes)).store(target + v * kLanes);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) total[v].store(sum + v * kLanes);
  }

  static void add_products(const float* row, const float* queries, int64_t padded, const int32_t* chosen,
                           const float* factors, int64_t count, float* block, float* sum) {
    int64_t e = 0;
    for (; e + 8 * kLanes <= padded; e += 8 * kLanes)
      add_products_sized<8>(row + e, queries + e, padded, chosen, factors, count, block + e, sum + e);
    for (; e + 4 * kLanes <= padded; e += 4 * kLanes)
      add_products_sized<4>(row + e, queries + e, padded, chosen, factors, count, block + e, sum + e);
    for (; e < padded; e += kLanes)
      add_products_sized<1>(row + e, queries + e, padded, chosen, factors, count, block + e, sum + e);
  }

  static void add_exponentials(const float* scores, uint32_t lanes, float temperature, ExponentialSum* sum) {
    V s = V::load(scores);
    if (temperature != 1.0f) s = V::divide(s, V::broadcast(temperature));
    uint32_t left = lanes & V::less(V::abs(s), V::broadcast(kHugeScore));
    if (left != lanes) {
      float divided[kLanes];
      s.store(divided);
      for (uint32_t huge = lanes & ~left; huge; huge &= huge - 1) sum->add_huge(divided[__builtin_ctz(huge)]);
    }
    const V n = V::round(V::multiply(s, V::broadcast(kLog2E)));
    const V f = remainder_of(s, n);
    const V p = exp_polynomial_of(f);
    int32_t exponents[kLanes];
    uint32_t mantissas[kLanes];
    n.store_integers(exponents);
    V::multiply(p, V::broadcast(kMantissaScale)).store_integers(reinterpret_cast<int32_t*>(mantissas));
    while (left) {
      const int32_t group = exponents[__builtin_ctz(left)] >> kGroupBits;
      const uint32_t members = left & V::lanes_of_group(exponents, group);
      if (group > sum->top) sum->raise(group);
      if (sum->counts(group)) V::add_shifted(exponents, mantissas, members, sum->lanes[ExponentialSum::place(group)]);
      left &= ~members;
    }
  }
};
