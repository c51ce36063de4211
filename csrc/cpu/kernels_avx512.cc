// AVX-512 F/BW/DQ/VL: one register holds the 16 running sums of a canonical dot.
#include <immintrin.h>

#include "../common/canonical_dot.h"
#include "../common/log_sum_exp.h"
#include "kernels.h"

namespace urm {

extern const CodeSums kAvx2CodeSums;

namespace {

#include "kernels_template.h"
#include "vector_avx512.h"

}  // namespace

extern const Kernels kAvx512Kernels = KernelsOf<Vector>::table("avx512", &kAvx2CodeSums);

}  // namespace urm
