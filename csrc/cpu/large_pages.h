// Memory that scans run through, in pages of 2 MiB where the system grants them: the processor then neither walks page
// tables nor stops fetching ahead every 4 KiB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace urm {

// To be asked for before the memory is first written. A hint: where it is refused, nothing else changes.
inline void ask_for_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace urm
