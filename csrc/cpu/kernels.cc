// Which instruction sets this machine can run.
#include "kernels.h"

#include <cstring>

#if defined(URM_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace urm {

extern const Kernels kPortableKernels;
#if defined(URM_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const CheapScore kVnniCheapScore;
extern const CodeSums kVnniCodeSums;
#endif
#if defined(URM_AMX)
extern const CheapScore kAmxCheapScore;
#endif

namespace {

#if defined(URM_X86)
Kernels with_vnni(const char* name, const CheapScore& cheap) {
  Kernels kernels = kAvx512Kernels;
  kernels.name = name;
  kernels.cheap = &cheap;
  kernels.codes = &kVnniCodeSums;
  return kernels;
}
#endif

#if defined(URM_AMX)
// Linux gives a process the tiles' registers on request only, and refuses where signal stacks are too small for them.
bool tiles_granted() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct UsableKernels {
  const Kernels* table[5];
#if defined(URM_X86)
  const Kernels vnni = with_vnni("avx512_vnni", kVnniCheapScore);
#endif
#if defined(URM_AMX)
  const Kernels amx = with_vnni("amx", kAmxCheapScore);
#endif
  int count = 0;

  UsableKernels() {
#if defined(URM_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni_there = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(URM_AMX)
    if (vnni_there && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
        __builtin_cpu_supports("amx-bf16") && tiles_granted())
      table[count++] = &amx;
#endif
    if (vnni_there) table[count++] = &vnni;
    if (avx512) table[count++] = &kAvx512Kernels;
    if (avx2) table[count++] = &kAvx2Kernels;
#endif
    table[count++] = &kPortableKernels;
  }
};

const UsableKernels& usable() {
  static const UsableKernels kernels;
  return kernels;
}

}  // namespace

const Kernels* const* usable_kernels(int* count) {
  *count = usable().count;
  return usable().table;
}

const Kernels* find_kernels(const char* name) {
  if (!*name) return usable().table[0];
  for (int i = 0; i < usable().count; ++i)
    if (!std::strcmp(usable().table[i]->name, name)) return usable().table[i];
  return nullptr;
}

}  // namespace urm
