#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <type_traits>

#include "device.h"

namespace urm {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

constexpr int kThreads = 512;
constexpr int kBlocksPerProcessor = 4;

// Each thread sums float4s a grid apart; the sum is stored only if it is NaN-free and impossible, so that the reads
// stay.
__global__ void read_all(const float4* data, int64_t count, float* never) {
  float total = 0.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
    const float4 x = data[i];
    total += (x.x + x.y) + (x.z + x.w);
  }
  if (total == 3.0e38f) *never = total;
}

struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent>;

Event make_event() {
  cudaEvent_t event;
  check(cudaEventCreate(&event));
  return Event(event);
}

}  // namespace

CudaReport cuda_report() {
  CudaReport report;
  cudaRuntimeGetVersion(&report.runtime_version);
  cudaDriverGetVersion(&report.driver_version);
  const cudaError_t error = cudaGetDeviceCount(&report.devices);
  if (error != cudaSuccess) {
    report.devices = 0;
    report.problem = cudaGetErrorString(error);
    cudaGetLastError();  // the error is reported, not kept for the next call
  }
  return report;
}

double cuda_read_bandwidth(uintptr_t data, int64_t count, uintptr_t stream_address) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  int device, processors;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const Event begin = make_event(), end = make_event();
  check(cudaEventRecord(begin.get(), stream));
  read_all<<<processors * kBlocksPerProcessor, kThreads, 0, stream>>>(reinterpret_cast<const float4*>(data), count / 4,
                                                                      reinterpret_cast<float*>(data));
  check(cudaGetLastError());
  check(cudaEventRecord(end.get(), stream));
  check(cudaEventSynchronize(end.get()));
  float milliseconds;
  check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
  return static_cast<double>(count / 4 * 4) * sizeof(float) / (milliseconds * 1e-3);
}

}  // namespace urm
