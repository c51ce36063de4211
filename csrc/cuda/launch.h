// Launches of the kernels in kernels.h. Nothing here waits for the device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace urm {

struct Grid {
  int64_t blocks, rows;  // of the grid: x and y
  int64_t threads, shared_bytes;
  uintptr_t stream;
};

// Every argument is a list of the 64-bit members that its struct has, or of one number. Throws std::runtime_error with
// CUDA's own words.
void launch(const std::string& name, Grid grid, const std::vector<std::vector<int64_t>>& arguments);

}  // namespace urm
