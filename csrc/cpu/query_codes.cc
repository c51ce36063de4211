#include "query_codes.h"

#include <algorithm>
#include <cmath>

namespace urm {
namespace {

constexpr float kLargestQueryCode = 127.0f;
constexpr double kGrowth = 1 + 1e-6;     // covers the roundings of sums in double precision and to float
constexpr float kLeastKept = 0x1p-120f;  // so that no product of a length with +inf is NaN

// Rotated copies of all queries, [total, padded].
AlignedVector<float> rotated(const PackedQueries& packed, int64_t padded, const Codes& codes, const Kernels& kernels) {
  const int64_t r = codes.rotation.r;
  AlignedVector<float> out(round_up(packed.total, kLanes) * padded), panel(kLanes * padded);
  std::copy(packed.rows.begin(), packed.rows.begin() + packed.total * padded, out.begin());
  std::fill(out.begin() + packed.total * padded, out.end(), 0.0f);
  for (int64_t q = 0; q < packed.total; q += kLanes) {
    kernels.to_code_panel(out.data() + q * padded, padded, r, panel.data());
    kernels.rotate_panel(codes.rotation, panel.data());
    kernels.from_code_panel(panel.data(), r, out.data() + q * padded, padded);
  }
  return out;
}

// Any constant is right; those from a file may be none at all.
float usable_reference(float reference, const Codes& codes) {
  const float most = static_cast<float>(largest_code(codes.bits) * std::sqrt(static_cast<double>(codes.rotation.r)));
  return reference >= 0 ? std::min(reference, most) : 0.0f;
}

float largest_element(const float* x, int64_t count) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (x[i] != x[i]) return x[i];
    largest = std::max(largest, std::fabs(x[i]));
  }
  return largest;
}

}  // namespace

QueryCodes encode_queries(const PackedQueries& packed, int64_t users, int64_t padded, const Codes& codes,
                          const Kernels& kernels) {
  const int64_t r = codes.rotation.r, quads = quads_of(r);
  const AlignedVector<float> queries = rotated(packed, padded, codes, kernels);
  QueryCodes out;
  int64_t groups = 0;
  for (int64_t user = 0; user < users; ++user) {
    const int64_t mine = (packed.start[user + 1] - packed.start[user] + kLanes - 1) / kLanes;
    out.first_group.push_back(groups);
    out.most_groups = std::max(out.most_groups, mine);
    groups += mine;
  }
  out.codes.resize(groups * quads * kLanes * kQuad);
  std::fill(out.codes.begin(), out.codes.end(), int8_t{0});
  for (auto* starts : {&out.starts, &out.row_starts}) {
    starts->resize(groups * kLanes);
    std::fill(starts->begin(), starts->end(), 0);
  }
  for (auto* lengths : {&out.kept, &out.lost, &out.likely_kept, &out.likely_lost}) {
    lengths->resize(groups * kLanes);
    std::fill(lengths->begin(), lengths->end(), 0.0f);
  }
  const float lost_reference = usable_reference(codes.lost_reference, codes);
  const float norm_reference = usable_reference(codes.norm_reference, codes);
  const int64_t scan_offset = code_offset(codes.bits);
  const int64_t row_offset = codes.fine ? code_offset(fine_bits(codes.bits)) : scan_offset;
  for (int64_t user = 0; user < users; ++user) {
    const int64_t first = packed.start[user], count = packed.start[user + 1] - first;
    const float* mine = queries.data() + first * padded;
    // What is zero stays zero; what the rotation makes of a query that is not finite is not finite.
    const float largest = largest_element(mine, count * padded);
    const float before = largest_element(packed.rows.data() + first * padded, count * padded);
    const float step = before == 0.0f ? 1.0f : largest / kLargestQueryCode;
    if (!(step >= kLeastCodeScale && step <= kLargestCodedLength)) return {};
    CodeBound bound{step, 0, 0, 0, kCodeUnderflow, lost_reference, norm_reference};
    for (int64_t j = 0; j < count; ++j) {
      const float* query = mine + j * padded;
      const int64_t at = out.first_group[user] * kLanes + j;
      int8_t* to = out.codes.data() + (at / kLanes * quads * kLanes + at % kLanes) * kQuad;
      double lost = 0, kept = 0;
      int64_t sum = 0;
      for (int64_t e = 0; e < r; ++e) {
        const float code = std::clamp(std::nearbyint(query[e] / step), -kLargestQueryCode, kLargestQueryCode);
        const double value = static_cast<double>(step) * code, rest = query[e] - value;
        lost += rest * rest;
        kept += value * value;
        sum += static_cast<int64_t>(code);
        to[e / kQuad * kLanes * kQuad + e % kQuad] = static_cast<int8_t>(code);
      }
      out.kept[at] = static_cast<float>(std::sqrt(kept) * kGrowth) + kLeastKept;
      out.lost[at] = static_cast<float>(std::sqrt(lost) * kGrowth) + kLeastKept;
      const double of_row = static_cast<double>(out.kept[at]) * lost_reference;
      const double of_query = static_cast<double>(out.lost[at]) * norm_reference;
      // Of a probable bound: standard deviations of two errors, which do not depend on each other.
      const double slack =
          codes.slack < 1 ? codes.slack * std::sqrt(of_row * of_row + of_query * of_query) : of_row + of_query;
      out.starts[at] = static_cast<int32_t>(std::ceil(slack / step * kGrowth) - scan_offset * sum);
      out.row_starts[at] = static_cast<int32_t>(-row_offset * sum);
      bound.kept = std::max(bound.kept, out.kept[at]);
      bound.lost = std::max(bound.lost, out.lost[at]);
      out.likely_kept[at] = out.kept[at] * codes.fine_slack;
      out.likely_lost[at] = out.lost[at] * codes.fine_slack;
    }
    if (!(bound.kept + bound.lost <= kLargestCodedLength)) return {};
    bound.error = code_error(r, rotation_roundings(codes.rotation)) * (bound.kept + bound.lost);
    bound.kept *= codes.slack;
    bound.lost *= codes.slack;
    out.bounds.push_back(bound);
  }
  return out;
}

}  // namespace urm
