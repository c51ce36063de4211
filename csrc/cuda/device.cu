#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>
#include <type_traits>

#include "device.h"
#include "mma.h"

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

constexpr int kProductThreads = 256;
constexpr int kProductBlocksPerProcessor = 2;  // four warps for each of its four tensor cores
constexpr int kAccumulators = 8;               // of a warp, whose products do not wait for each other
constexpr int64_t kOperations = 2 * 16 * 8 * 32;

__device__ int32_t never_stored;

// Bytes of b are even, and so is every sum: it would be stored if it were odd, so that the products stay.
__global__ void __launch_bounds__(kProductThreads, kProductBlocksPerProcessor) products_of_bytes(int64_t steps) {
  uint32_t a[4], b[kAccumulators][2];
  int32_t d[kAccumulators][4] = {};
  uint32_t bits = blockIdx.x * kProductThreads + threadIdx.x;
  // Like those of codes, not zeros, for which a card would draw less power.
  const auto drawn = [&bits] { return bits = bits * 1664525u + 1013904223u; };
  for (uint32_t& word : a) word = drawn();
  for (auto& column : b)
    for (uint32_t& word : column) word = drawn() & 0xFEFEFEFEu;
#pragma unroll 4
  for (int64_t step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) multiply_bytes<false>(d[i], a, b[i][0], b[i][1]);
  uint32_t total = 0;
  for (const auto& products : d)
    for (const int32_t product : products) total += static_cast<uint32_t>(product);
  if (total % 2 != 0) never_stored = static_cast<int32_t>(total);
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

int processors_of_device() {
  int device, processors;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  return processors;
}

// Seconds that what `launch` queues takes.
template <class Launch>
double seconds(cudaStream_t stream, const Launch& launch) {
  const Event begin = make_event(), end = make_event();
  check(cudaEventRecord(begin.get(), stream));
  launch();
  check(cudaGetLastError());
  check(cudaEventRecord(end.get(), stream));
  check(cudaEventSynchronize(end.get()));
  float milliseconds;
  check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()));
  return milliseconds * 1e-3;
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
  const int blocks = processors_of_device() * kBlocksPerProcessor;
  const double taken = seconds(stream, [&] {
    read_all<<<blocks, kThreads, 0, stream>>>(reinterpret_cast<const float4*>(data), count / 4,
                                              reinterpret_cast<float*>(data));
  });
  return static_cast<double>(count / 4 * 4) * sizeof(float) / taken;
}

double cuda_byte_products(int64_t steps, uintptr_t stream_address) {
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int blocks = processors_of_device() * kProductBlocksPerProcessor;
  const double taken = seconds(stream, [&] { products_of_bytes<<<blocks, kProductThreads, 0, stream>>>(steps); });
  const int64_t warps = static_cast<int64_t>(blocks) * (kProductThreads / kWarp);
  return static_cast<double>(warps * steps) * (kAccumulators * kOperations) / taken;
}

}  // namespace urm
