// The kernels of csrc/cuda as a library of the host, launched by name; simt.h is included before all else.
#include "../../csrc/cuda/kernels.h"

#include <mutex>

namespace {

struct Named {
  const char* name;
  void (*launch)(urm_simt::Index, int, std::size_t, const void* const*);
};

#define URM_NAMED(...)                                                                                       \
  Named{#__VA_ARGS__, [](urm_simt::Index grid, int threads, std::size_t shared, const void* const* values) { \
          urm_simt::launch(__VA_ARGS__, grid, threads, shared, values);                                      \
        }},

const Named kKernels[] = {URM_KERNELS(URM_NAMED) URM_SCANS(URM_NAMED)};
std::mutex one_at_a_time;

}  // namespace

// The reason why it failed, or null.
extern "C" const char* urm_launch(const char* name, int64_t blocks, int64_t rows_of_blocks, int64_t threads,
                                  int64_t shared, const void* const* values) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  for (const Named& kernel : kKernels)
    if (std::strcmp(kernel.name, name) == 0) {
      try {
        kernel.launch({static_cast<unsigned>(blocks), static_cast<unsigned>(rows_of_blocks), 1},
                      static_cast<int>(threads), shared, values);
      } catch (const std::logic_error& error) {
        return urm_simt::failure;
      }
      return nullptr;
    }
  return "there is no kernel of this name";
}
