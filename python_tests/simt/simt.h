// CUDA kernels as plain C++, on a machine without a GPU: every thread of a block is a fiber of its own stack, and what
// a warp does together (shuffles, votes, barriers, products on the tensor cores) waits until all of its lanes are
// there.
//
// It finds wrong indices, layouts and arithmetic, lanes that part before they meet again, and reads of shared memory
// that nobody has written (which starts as NaN). It does not find races. Blocks run one after the other, whole warps
// only; x86-64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define URM_DYNAMIC_SHARED(name) unsigned char* const name = urm_simt::dynamic_shared()

namespace urm_simt {

struct Index {
  unsigned x, y, z;
};

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 1 << 16;

using Word = uint64_t;

// What the lanes of a warp bring to a meeting. Two in turns: a lane may be on its way to the next one before all others
// have left.
struct Meeting {
  const char* what;
  uint32_t arrived;
  Word brought[kWarp][4];
};

struct Warp {
  Meeting meetings[2];
  uint32_t held[2];  // meetings over; parity says which is next
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  bool done = false;
  unsigned meetings = 0;  // that it has left
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  unsigned at_barrier = 0, barriers = 0;
  int threads = 0, current = 0;
  void* scheduler = nullptr;
  void (*entry)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block block;
inline Index block_index, block_size, grid_size;
inline const char* failure = nullptr;  // what is wrong with the kernel; it is left where it stands
inline uint64_t arrivals = 0;          // of threads at places where they wait, and at the end

extern "C" void urm_simt_switch(void** from, void* to);
asm(R"(
.text
.globl urm_simt_switch
.type urm_simt_switch, @function
urm_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size urm_simt_switch, .-urm_simt_switch
)");

inline Index thread_index() {
  return {static_cast<unsigned>(block.current), 0, 0};
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.shared.data()) + 15) & ~uintptr_t{15});
}

// To the next thread that is not done, or back to the scheduler behind the last one.
inline void leave() {
  void** own = &block.fibers[block.current].stack_pointer;
  int next = block.current + 1;
  while (next < block.threads && block.fibers[next].done) ++next;
  if (next == block.threads || failure) return urm_simt_switch(own, block.scheduler);
  block.current = next;
  urm_simt_switch(own, block.fibers[next].stack_pointer);
}

inline void run_fiber() {
  block.entry(block.arguments);
  block.fibers[block.current].done = true;
  ++arrivals;
  leave();
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
  const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStackBytes) & ~uintptr_t{15};
  // Six registers, the address to return to, and nothing above, as at the start of a function.
  void** stack = reinterpret_cast<void**>(top) - 8;
  for (int i = 0; i < 6; ++i) stack[i] = nullptr;
  stack[6] = reinterpret_cast<void*>(run_fiber);
  stack[7] = nullptr;
  fiber.stack_pointer = stack;
  fiber.done = false;
  fiber.meetings = 0;
}

inline void run_block(int threads, std::size_t shared_bytes) {
  block.fibers.resize(std::max<std::size_t>(block.fibers.size(), threads));
  block.warps.assign(threads / kWarp, Warp{});
  block.shared.assign(shared_bytes + 16, 0xFF);
  block.at_barrier = block.barriers = 0;
  block.threads = threads;
  for (int t = 0; t < threads; ++t) prepare(block.fibers[t]);
  for (;;) {
    const uint64_t before = arrivals;
    for (block.current = 0; block.current < threads && block.fibers[block.current].done;) ++block.current;
    if (block.current == threads) return;
    urm_simt_switch(&block.scheduler, block.fibers[block.current].stack_pointer);
    if (!failure && arrivals == before) failure = "threads wait for each other at different places";
    if (failure) return;
  }
}

// All lanes of a warp meet; `after` sees what each has brought.
template <class After>
auto meet(const char* what, const Word* words, int count, After after) {
  const int lane = block.current % kWarp;
  Warp& warp = block.warps[block.current / kWarp];
  Fiber& fiber = block.fibers[block.current];
  const unsigned turn = fiber.meetings++;
  Meeting& meeting = warp.meetings[turn % 2];
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what && std::strcmp(meeting.what, what) != 0)
    failure = "lanes of a warp meet for different things";
  std::copy(words, words + count, meeting.brought[lane]);
  meeting.arrived |= 1u << lane;
  ++arrivals;
  if (meeting.arrived == ~0u) {
    meeting.arrived = 0;
    ++warp.held[turn % 2];
  }
  while (warp.held[turn % 2] <= turn / 2 && !failure) leave();
  if (failure) leave();
  return after(meeting.brought, lane);
}

template <class T>
Word to_word(T value) {
  static_assert(sizeof(T) <= sizeof(Word));
  Word word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

template <class T>
T from_word(Word word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void whole_warp(unsigned mask) {
  if (mask != ~0u) failure = "a part of a warp meets";
}

// d += a b on the tensor cores, m16n8k32: a has bytes of type A, 16 x 32, b signed ones, 32 x 8, d is 16 x 8. Where the
// elements lie is what the PTX manual says of mma.m16n8k32 for .u8/.s8: with g = lane / 4 and t = lane % 4, byte i of
//
//   a register 0: row g, column 4 t + i       1: row g + 8, column 4 t + i
//     register 2: row g, column 4 t + i + 16  3: row g + 8, column 4 t + i + 16
//   b register 0: row 4 t + i, column g       1: row 4 t + i + 16, column g
//   d register 0, 1: row g, column 2 t, 2 t + 1    2, 3: row g + 8, column 2 t, 2 t + 1
template <class A>
void multiply_bytes(int32_t* d, const uint32_t* a, const uint32_t* b) {
  const Word words[3] = {a[0] | Word{a[1]} << 32, a[2] | Word{a[3]} << 32, b[0] | Word{b[1]} << 32};
  meet("mma", words, 3, [d](const Word(*brought)[4], int lane) {
    const auto byte_of = [](Word pair, int which, int i) { return static_cast<uint8_t>(pair >> (32 * which + 8 * i)); };
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
      for (int k = 0; k < 32; ++k) {
        const int high = k / 16, t = k % 16 / 4, i = k % 4;
        const A x = static_cast<A>(byte_of(brought[row % 8 * 4 + t][high], row / 8, i));
        const int8_t y = static_cast<int8_t>(byte_of(brought[column * 4 + t][2], high, i));
        d[c] += x * y;
      }
    }
    return 0;
  });
}

template <class... A>
struct Packed {
  void (*kernel)(A...);
  const void* const* values;
};

template <class... A, std::size_t... I>
void call(const Packed<A...>& packed, std::index_sequence<I...>) {
  packed.kernel(*static_cast<const std::decay_t<A>*>(packed.values[I])...);
}

template <class... A>
void launch(void (*kernel)(A...), Index grid, int threads, std::size_t shared_bytes, const void* const* values) {
  Packed<A...> packed{kernel, values};
  block.entry = [](void* arguments) { call(*static_cast<Packed<A...>*>(arguments), std::index_sequence_for<A...>()); };
  block.arguments = &packed;
  grid_size = grid;
  block_size = {static_cast<unsigned>(threads), 1, 1};
  failure = nullptr;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block_index = {x, y, 0};
      run_block(threads, shared_bytes);
      if (failure) throw std::logic_error(failure);
    }
}

}  // namespace urm_simt

#define threadIdx urm_simt::thread_index()
#define blockIdx urm_simt::block_index
#define blockDim urm_simt::block_size
#define gridDim urm_simt::grid_size

inline void __syncwarp() {
  const urm_simt::Word none = 0;
  urm_simt::meet("__syncwarp", &none, 1, [](auto&&, int) { return 0; });
}

inline void __syncthreads() {
  using urm_simt::block;
  const unsigned turn = block.barriers;
  ++urm_simt::arrivals;
  unsigned living = 0;
  for (std::size_t t = 0; t < block.warps.size() * urm_simt::kWarp; ++t) living += !block.fibers[t].done;
  if (++block.at_barrier == living) {
    block.at_barrier = 0;
    ++block.barriers;
  }
  while (block.barriers == turn && !urm_simt::failure) urm_simt::leave();
  if (urm_simt::failure) urm_simt::leave();
}

// What the lane `source(lane)` has brought.
template <class T, class Source>
T shuffled(const char* what, unsigned mask, T value, Source source) {
  urm_simt::whole_warp(mask);
  const urm_simt::Word word = urm_simt::to_word(value);
  return urm_simt::meet(what, &word, 1, [source](const urm_simt::Word(*brought)[4], int lane) {
    return urm_simt::from_word<T>(brought[source(lane) & 31][0]);
  });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return shuffled("__shfl_sync", mask, value, [from](int) { return from; });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  return shuffled("__shfl_xor_sync", mask, value, [apart](int lane) { return lane ^ apart; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  urm_simt::whole_warp(mask);
  const urm_simt::Word word = predicate != 0;
  return urm_simt::meet("__ballot_sync", &word, 1, [](const urm_simt::Word(*brought)[4], int) {
    unsigned votes = 0;
    for (int lane = 0; lane < urm_simt::kWarp; ++lane) votes |= static_cast<unsigned>(brought[lane][0]) << lane;
    return votes;
  });
}

inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

template <class T>
T atomicAnd(T* address, T value) {
  const T before = *address;
  *address = before & value;
  return before;
}

template <class T>
T atomicOr(T* address, T value) {
  const T before = *address;
  *address = before | value;
  return before;
}

struct uint4 {
  uint32_t x, y, z, w;
};
struct int2 {
  int32_t x, y;
};
struct float4 {
  float x, y, z, w;
};

template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) urm_simt::failure = "a load is not aligned";
  return *address;
}

inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline int __ffs(uint32_t x) {
  return __builtin_ffs(static_cast<int>(x));
}
inline uint32_t __float_as_uint(float x) {
  return urm_simt::from_word<uint32_t>(urm_simt::to_word(x));
}
inline float __uint_as_float(uint32_t x) {
  return urm_simt::from_word<float>(x);
}
