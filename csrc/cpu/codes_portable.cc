// Sums of products of codes in plain C++: the specification of codes_avx2.cc and codes_vnni.cc.
#include <algorithm>

#include "code_kernels.h"

namespace urm {
namespace {

int32_t query_code(const int8_t* queries, int64_t quads, int64_t q, int64_t e) {
  return queries[((q / kLanes * quads + e / kQuad) * kLanes + q % kLanes) * kQuad + e % kQuad];
}

template <int Bits>
void largest(const char* codes, int64_t stride, int64_t blocks, int64_t quads, const int8_t* queries,
             const int32_t* starts, int64_t count, Ahead, int32_t* largest) {
  for (int64_t row = 0; row < blocks * kBlockRows; ++row) {
    const uint8_t* block = reinterpret_cast<const uint8_t*>(codes + row / kBlockRows * stride);
    const int64_t lane = row % kBlockRows;
    for (int64_t q = 0; q < count; ++q) {
      int32_t sum = starts[q];
      for (int64_t e = 0; e < quads * kQuad; ++e) {
        const int32_t byte = block[code_place(lane, e, Bits)] >> code_shift(lane, e, Bits);
        const int32_t stored = byte & ((1 << Bits) - 1);
        sum += (Bits == 2 ? 2 * stored : stored) * query_code(queries, quads, q, e);
      }
      int32_t& most = largest[q / kLanes * blocks * kBlockRows + row];
      most = q % kLanes ? std::max(most, sum) : sum;
    }
  }
}

void of_row(const uint8_t* row, int64_t quads, const int8_t* queries, const int32_t* starts, int64_t groups,
            int32_t* sums) {
  for (int64_t q = 0; q < groups * kLanes; ++q) {
    sums[q] = starts[q];
    for (int64_t e = 0; e < quads * kQuad; ++e) sums[q] += row[e] * query_code(queries, quads, q, e);
  }
}

constexpr int kChains = 64;

int32_t rate_loop(int64_t steps) {
  int32_t sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = i;
  for (int64_t s = 0; s < steps; ++s)
    for (int i = 0; i < kChains; ++i) sums[i] = (sums[i] & 0xFF) * 3 + i;
  return *std::max_element(sums, sums + kChains);
}

}  // namespace

extern const CodeSums kPortableCodeSums = {largest<2>, largest<4>, largest<8>, of_row, rate_loop, 2 * kChains};

}  // namespace urm
