// The kernels as nvcc compiles them, and how one is launched by name.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <unordered_map>

#include "kernels.h"
#include "launch.h"

namespace urm {
namespace {

constexpr std::size_t kSharedWithoutAsking = 48 << 10;

#define URM_NAMED(...) {#__VA_ARGS__, reinterpret_cast<const void*>(&__VA_ARGS__)},

const std::unordered_map<std::string, const void*>& kernels() {
  static const std::unordered_map<std::string, const void*> named = {URM_KERNELS(URM_NAMED) URM_SCANS(URM_NAMED)};
  return named;
}

void check(cudaError_t error, const std::string& name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is raised, not kept for the next call
  throw std::runtime_error(name + ": " + cudaGetErrorString(error));
}

}  // namespace

void launch(const std::string& name, Grid grid, const std::vector<std::vector<int64_t>>& arguments) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::invalid_argument("there is no kernel called " + name);
  std::vector<void*> values;
  for (const std::vector<int64_t>& words : arguments) values.push_back(const_cast<int64_t*>(words.data()));
  if (static_cast<std::size_t>(grid.shared_bytes) > kSharedWithoutAsking)
    check(cudaFuncSetAttribute(found->second, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          name);
  check(cudaLaunchKernel(found->second, dim3(grid.blocks, grid.rows), dim3(grid.threads), values.data(),
                         grid.shared_bytes, reinterpret_cast<cudaStream_t>(grid.stream)),
        name);
}

}  // namespace urm
