// What every other header stands on: integer types, memcpy, and how a function is marked that runs on host and device.
//
// Three compilers read these sources for a GPU: nvcc, NVRTC (which has no standard headers), and, in tests on a machine
// without one, the host's own (python_tests/simt/).
#pragma once

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

// Internal linkage, so that files compiled for different instruction sets never share a symbol.
#if defined(__CUDACC__)
#define URM_HOST_DEVICE static __host__ __device__ inline
#else
#define URM_HOST_DEVICE static inline
#endif
