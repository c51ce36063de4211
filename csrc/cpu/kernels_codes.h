// Codes of rows and what their bounds rule out, over a vector type V of 16 floats; part of kernels_template.h, whose
// rules hold here, too. A *code panel* holds 16 rows as [element][row]: every step is the same for all rows, and no
// instruction set changes a bit of a code.
#pragma once

template <class V>
struct CodeKernelsOf {
  static constexpr int kSums = kCodeSums;

  static void to_code_panel(const float* rows, int64_t stride, int64_t r, float* panel) {
    for (int64_t e = 0; e < r; e += kLanes) {
      V lane[kLanes];
      for (int i = 0; i < kLanes; ++i) lane[i] = V::load(rows + i * stride + e);
      V::transpose(lane);
      for (int j = 0; j < kLanes && e + j < r; ++j) lane[j].store(panel + (e + j) * kLanes);
    }
  }

  static void from_code_panel(const float* panel, int64_t r, float* rows, int64_t stride) {
    for (int64_t e = 0; e < r; e += kLanes) {
      V lane[kLanes];
      for (int j = 0; j < kLanes; ++j) lane[j] = e + j < r ? V::load(panel + (e + j) * kLanes) : V::zero();
      V::transpose(lane);
      for (int i = 0; i < kLanes; ++i) lane[i].store(rows + i * stride + e);
    }
  }

  static V difference(V x, V y) { return V::fma(y, V::broadcast(-1.0f), x); }  // one rounding, as x - y

  // Additions of one step of a rotation, `apart` doubling, two levels at a time where there are two.
  template <class Place>
  static void hadamard(int64_t p, Place at) {
    int64_t apart = 1;
    for (; 4 * apart <= p; apart *= 4)
      for (int64_t first = 0; first < p; first += 4 * apart)
        for (int64_t i = first; i < first + apart; ++i) {
          float *a = at(i), *b = at(i + apart), *c = at(i + 2 * apart), *d = at(i + 3 * apart);
          const V va = V::load(a), vb = V::load(b), vc = V::load(c), vd = V::load(d);
          const V ab = V::add(va, vb), a_b = difference(va, vb), cd = V::add(vc, vd), c_d = difference(vc, vd);
          V::add(ab, cd).store(a);
          V::add(a_b, c_d).store(b);
          difference(ab, cd).store(c);
          difference(a_b, c_d).store(d);
        }
    if (apart < p)
      for (int64_t i = 0; i < apart; ++i) {
        float *a = at(i), *b = at(i + apart);
        const V va = V::load(a), vb = V::load(b);
        V::add(va, vb).store(a);
        difference(va, vb).store(b);
      }
  }

  static void rotate_panel(const Rotation& rotation, float* panel) {
    const float factor = rotation_factor(rotation);
    for (int64_t step = 0; step < rotation.steps; ++step) {
      const float* signs = rotation.signs + step * rotation.p;
      const int64_t start = start_of_step(rotation, step), left = rotation.r - start;
      const auto at = [=](int64_t i) { return panel + (i < left ? start + i : i - left) * kLanes; };
      for (int64_t i = 0; i < rotation.p; ++i)
        V::multiply(V::load(at(i)), V::broadcast(signs[i] * factor)).store(at(i));
      if (rotation.p == rotation.r) hadamard(rotation.p, [=](int64_t i) { return panel + i * kLanes; });
      else hadamard(rotation.p, at);
    }
  }

  // The sum over elements of term(e, sum so far).
  template <class Term>
  static V sum_of(int64_t r, Term term) {
    V sums[kSums];
    for (int j = 0; j < kSums; ++j) sums[j] = V::zero();
    int64_t e = 0;
    for (; e + kSums <= r; e += kSums)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) sums[j] = term(e + j, sums[j]);
    for (; e < r; ++e) sums[e % kSums] = term(e, sums[e % kSums]);
    return V::add(V::add(sums[0], sums[2]), V::add(sums[1], sums[3]));
  }

  static V largest_of_panel(const float* panel, int64_t r) {
    V largest = V::zero();
    for (int64_t e = 0; e < r; ++e) largest = V::max(V::abs(V::load(panel + e * kLanes)), largest);
    return largest;
  }

  // The nearest code; of 2 bits, the nearest odd one.
  static V code_of(V x, V inverse, int bits) {
    const float most = static_cast<float>(largest_code(bits));
    const V limit = V::broadcast(most), half = V::broadcast(0.5f);
    V code = V::multiply(x, inverse);
    code = V::round(bits == 2 ? V::fma(code, half, V::broadcast(-0.5f)) : code);
    if (bits == 2) code = V::fma(code, V::broadcast(2.0f), V::broadcast(1.0f));
    return V::max(V::select_less(limit, code, limit, code), V::broadcast(-most));
  }

  // 16 rows of a rotated panel, which is normalised in place; `largest` are those of the rows before the rotation.
  // See EncodedRows.
  static void encode_panel(float* panel, int64_t r, const float* largest_before, int bits, EncodedRows* out) {
    float largest[kLanes], inverse[kLanes];
    RowExponent exponents[kLanes];
    largest_of_panel(panel, r).store(largest);
    for (int i = 0; i < kLanes; ++i) {
      exponents[i] = row_exponent(largest[i]);
      inverse[i] = exponents[i].inverse;
      largest[i] *= inverse[i];
    }
    const V normalise = V::load(inverse);
    for (int64_t e = 0; e < r; ++e) V::multiply(V::load(panel + e * kLanes), normalise).store(panel + e * kLanes);

    const auto at = [=](int64_t e) { return V::load(panel + e * kLanes); };
    const V squares = sum_of(r, [&](int64_t e, V sum) { return V::fma(at(e), at(e), sum); });
    V best = V::broadcast(-1.0f), step_inverse = V::zero();
    for (int clip = 0; clip < clips_of(bits); ++clip) {
      const V step = V::multiply(V::load(largest), V::broadcast(clip_of(clip, bits)));
      const V factor = V::divide(V::broadcast(1.0f), step);
      V length = V::zero();
      const V dot = sum_of_both(r, at, factor, bits, &length);
      const V quality = V::divide(V::multiply(dot, dot), length);  // of the angle, which is all that the scale leaves
      step_inverse = V::select_less(best, quality, factor, step_inverse);
      best = V::select_less(best, quality, quality, best);
    }
    V length = V::zero();
    const V dot = sum_of_both(r, at, step_inverse, bits, &length);
    const V scale = V::divide(squares, dot);  // unbiased: what is lost is orthogonal to the row
    const V rest = sum_of(r, [&](int64_t e, V sum) {
      const V lost = V::fma(V::multiply(scale, V::broadcast(-1.0f)), code_of(at(e), step_inverse, bits), at(e));
      return V::fma(lost, lost, sum);
    });
    float scales[kLanes], rests[kLanes], lengths[kLanes];
    scale.store(scales), rest.store(rests), squares.store(lengths);
    uint32_t kept[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const EncodedSide made = encoded_side(largest_before[i], exponents[i], lengths[i], rests[i], scales[i], r, bits);
      out->scale[i] = made.side.scale, out->lost[i] = made.side.lost, out->norm[i] = made.side.norm;
      kept[i] = made.kept ? ~0u : 0;
    }
    write_quads(panel, r, step_inverse, bits, kept, out->quads);
  }

  // Sum of x c, and of c c as *length, for the codes c that `inverse` makes.
  template <class At>
  static V sum_of_both(int64_t r, At at, V inverse, int bits, V* length) {
    V dots[kSums], lengths[kSums];
    for (int j = 0; j < kSums; ++j) dots[j] = lengths[j] = V::zero();
    const auto add = [&](int64_t e, int j) {
      const V x = at(e), code = code_of(x, inverse, bits);
      dots[j] = V::fma(x, code, dots[j]);
      lengths[j] = V::fma(code, code, lengths[j]);
    };
    int64_t e = 0;
    for (; e + kSums <= r; e += kSums)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) add(e + j, j);
    for (; e < r; ++e) add(e, static_cast<int>(e % kSums));
    *length = V::add(V::add(lengths[0], lengths[2]), V::add(lengths[1], lengths[3]));
    return V::add(V::add(dots[0], dots[2]), V::add(dots[1], dots[3]));
  }

  // quads[q][i]: the bytes code + offset of four elements of row i; codes of rows that are not kept, and past the end,
  // are no_code.
  static void write_quads(const float* panel, int64_t r, V inverse, int bits, const uint32_t* kept,
                          uint32_t (*quads)[kLanes]) {
    const uint32_t none = static_cast<uint32_t>(no_code(bits)), offset = static_cast<uint32_t>(code_offset(bits));
    for (int64_t e = 0; e < r; e += kQuad, ++quads) {
      int32_t codes[kQuad][kLanes];
      for (int j = 0; j < kQuad; ++j)
        if (e + j < r) code_of(V::load(panel + (e + j) * kLanes), inverse, bits).store_integers(codes[j]);
        else
          for (int32_t& code : codes[j]) code = no_code(bits);
      for (int i = 0; i < kLanes; ++i) {
        uint32_t quad = 0;
        for (int j = 0; j < kQuad; ++j) {
          const uint32_t code = kept[i] ? static_cast<uint32_t>(codes[j][i]) : none;
          quad |= ((code + offset) & 0xFFu) << 8 * j;
        }
        (*quads)[i] = quad;
      }
    }
  }

  // Bounds of blocks from a user's largest sums; see Kernels.
  static void prune_codes(const int32_t* sums, int64_t groups, const char* sides, int64_t stride, int64_t blocks,
                          const CodeBound& user, float relative, float offset, const float* bias, float threshold,
                          float* bounds, uint32_t* survivors) {
    const V step = V::broadcast(user.step), kept = V::broadcast(user.kept), lost = V::broadcast(user.lost);
    const V error = V::broadcast(user.error), underflow = V::broadcast(user.underflow), least = V::broadcast(threshold);
    const V no_lost = V::broadcast(-user.lost_reference), no_norm = V::broadcast(-user.norm_reference);
    for (int64_t b = 0; b < blocks; ++b, sides += stride) {
      survivors[b] = 0;
      for (int half = 0; half < kBlockRows; half += kLanes, sums += kLanes, bounds += kLanes) {
        const float* scale = reinterpret_cast<const float*>(sides) + half;
        const V e = V::widen(sides + kBlockRows * 4, DType::kFloat16, half);
        const V n = V::widen(sides + kBlockRows * 6, DType::kFloat16, half);
        V largest = V::from_integers(sums);  // monotone: the largest of the conversions is that of the largest
        for (int64_t g = 1; g < groups; ++g)
          largest = V::max(V::from_integers(sums + g * blocks * kBlockRows), largest);
        V bound = V::multiply(largest, step);
        bound = V::fma(V::max(V::add(e, no_lost), V::zero()), kept, bound);
        bound = V::fma(V::max(V::add(n, no_norm), V::zero()), lost, bound);
        bound = V::fma(n, error, bound);
        bound = V::fma(bound, V::load(scale), underflow);
        if (relative) bound = V::add(V::fma(V::abs(bound), V::broadcast(relative), bound), V::broadcast(offset));
        if (bias) bound = V::add(bound, V::load(bias + b * kBlockRows + half));
        bound.store(bounds);
        survivors[b] |= (~V::less(bound, least) & 0xFFFFu) << half;
      }
    }
  }

  // Bounds of one row for 16 queries, from their own lengths.
  static void bounds_of_queries(const int32_t* sums, const float* kept, const float* lost, const CodedRow& row,
                                const CodeBound& user, float* bounds) {
    const CodedLengths<V> lengths{V::broadcast(row.scale), V::broadcast(row.lost), V::broadcast(row.norm)};
    code_bound(V::from_integers(sums), V::broadcast(user.step), V::load(kept), V::load(lost), V::broadcast(user.error),
               V::broadcast(user.underflow), lengths)
        .store(bounds);
  }
};
