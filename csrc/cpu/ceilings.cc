#include "ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "thread_pool.h"

namespace urm {
namespace {

template <class Body>
double seconds(Body body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::atomic<float> sink;  // keeps the measured loops from being optimised away

}  // namespace

double read_bandwidth(const float* data, int64_t count, int threads, const Kernels& kernels) {
  constexpr int64_t kChunk = 1 << 16;
  std::atomic<int64_t> next{0};
  const double elapsed = seconds([&] {
    run_parallel(threads, [&](int) {
      float total = 0;
      for (int64_t begin; (begin = next.fetch_add(kChunk)) < count;)
        total += kernels.read_loop(data + begin, std::min(kChunk, count - begin));
      sink.store(total);
    });
  });
  return static_cast<double>(count) * sizeof(float) / elapsed;
}

double gather_bandwidth(const MatrixView& items, const int64_t* rows, int64_t count, int threads) {
  constexpr int64_t kAhead = 32;  // rows
  const int64_t bytes = items.columns * element_bytes(items.dtype);
  const int64_t piece = (count + threads - 1) / threads;  // a thread's: it fetches nothing that another one reads
  std::atomic<int64_t> next{0};
  const double elapsed = seconds([&] {
    run_parallel(threads, [&](int) {
      float total = 0;
      for (int64_t begin; (begin = next.fetch_add(piece)) < count;)
        for (int64_t i = begin, end = std::min(count, begin + piece); i < end; ++i) {
          if (i + kAhead < end) {
            const char* ahead = row_address(items, rows[i + kAhead]);
            for (int64_t byte = 0; byte < bytes; byte += kCacheLine) __builtin_prefetch(ahead + byte);
          }
          const char* row = row_address(items, rows[i]);
          for (int64_t byte = 0; byte < bytes; byte += kCacheLine) total += row[byte];
        }
      sink.store(total);
    });
  });
  return static_cast<double>(count * bytes) / elapsed;
}

namespace {

// Seconds that `steps` of a loop take, all threads together.
template <class Loop>
double seconds_of_steps(int64_t* steps, int threads, Loop loop) {
  constexpr int64_t kPiece = 4096;
  const int64_t pieces = *steps / kPiece;
  std::atomic<int64_t> next{0};
  *steps = pieces * kPiece;
  return seconds([&] {
    run_parallel(threads, [&](int) {
      float total = 0;
      while (next.fetch_add(1) < pieces) total += static_cast<float>(loop(kPiece));
      sink.store(total);
    });
  });
}

}  // namespace

double fma_rate(int64_t steps, int threads, const Kernels& kernels) {
  const double elapsed = seconds_of_steps(&steps, threads, kernels.fma_loop);
  return static_cast<double>(steps) * kernels.fma_loop_operations / elapsed;
}

double code_rate(int64_t steps, int threads, const Kernels& kernels) {
  const double elapsed = seconds_of_steps(&steps, threads, kernels.codes->rate_loop);
  return static_cast<double>(steps) * kernels.codes->rate_loop_operations / elapsed;
}

}  // namespace urm
