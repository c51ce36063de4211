// What the CUDA runtime says of this machine, and the ceilings beside every GPU timing.
#pragma once

#include <cstdint>
#include <string>

namespace urm {

struct CudaReport {
  int runtime_version = 0;  // as CUDA writes it: 13000 is 13.0
  int driver_version = 0;   // 0: no driver
  int devices = 0;
  std::string problem;  // empty where devices can be used
};

CudaReport cuda_report();

// Bytes a second of one read of `count` floats at a device address, on the given stream; waits for it to finish.
// Throws std::runtime_error with CUDA's own words.
double cuda_read_bandwidth(uintptr_t data, int64_t count, uintptr_t stream);

// Operations (a multiply-add is two) a second of unsigned with signed bytes on the tensor cores, as scans of codes
// issue them (mma.sync), from registers alone; every warp takes `steps` of eight products. Otherwise as above.
double cuda_byte_products(int64_t steps, uintptr_t stream);

}  // namespace urm
