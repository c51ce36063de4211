// What this machine can do at best, measured by loops of the same kernels: the floor beside every timing.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace urm {

// Bytes a second of one read of `count` floats, split over `threads`.
double read_bandwidth(const float* data, int64_t count, int threads, const Kernels& kernels);

// Bytes a second of one read of chosen rows, whose elements follow each other, split over `threads`; nothing is
// computed.
double gather_bandwidth(const MatrixView& items, const int64_t* rows, int64_t count, int threads);

// fp32 operations a second (a multiply-add counts two) of independent register chains on `threads`.
double fma_rate(int64_t steps, int threads, const Kernels& kernels);

// Integer operations a second (a multiply-add counts two) of the fastest products of codes on `threads`.
double code_rate(int64_t steps, int threads, const Kernels& kernels);

}  // namespace urm
