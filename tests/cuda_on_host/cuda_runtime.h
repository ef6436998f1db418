// The part of CUDA that this project's kernels use, on the host: a block at a time, its threads as fibers that run
// from barrier to barrier, a warp ahead of the others as far as it can, odd blocks from the last warp down. For tests
// of the kernels' arithmetic where there is no GPU; finds missing barriers of a block, but not every race.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaMemcpyDeviceToDevice = 3 };
enum Attribute { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "on the host"; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

// A small device, so that persistent blocks take several tiles, with the shared memory of compute capability 8.9.
inline cudaError_t cudaDeviceGetAttribute(int* value, Attribute which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 101376;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= 101376 ? cudaSuccess : cudaErrorInvalidValue;
}

// Compiled for an architecture whose launches may begin early, unless a test says otherwise.
namespace host {
inline int compiled_for = 90;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = host::compiled_for;
  return cudaSuccess;
}

namespace host {

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "CUDA on the host: %s\n", why);
  abort();
}

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned access");
}

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };
struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};
struct Fiber {
  ucontext_t context;
  State state = kReady;
  bool predicate = false, waited = false;
  unsigned ballot = 0, exchanges = 0;
  std::vector<Copy> open;                   // asynchronous copies of the group that is not committed
  std::deque<std::vector<Copy>> committed;  // and of those that are not waited for
};
struct Exchange {
  char bytes[32];
};
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<char>> stacks;
inline std::vector<Exchange> exchanged[2];
inline std::vector<uint4> dynamic;
inline size_t dynamic_bytes = 0;
inline std::function<void()> kernel;
inline ucontext_t scheduler;

// Whether the launch may begin before the end of the one before, and the wait for that end.
inline bool early = false;
inline void wait_for_previous() { fibers[threadIdx.x].waited = true; }

inline void check_wait() {
  if (early && !fibers[threadIdx.x].waited) fail("a thread of a launch that begins early has not waited");
}

inline void run_fiber() {
  kernel();
  check_wait();
  fibers[threadIdx.x].state = kDone;
}

inline void wait_at(State barrier) {
  Fiber& me = fibers[threadIdx.x];
  me.state = barrier;
  swapcontext(&me.context, &scheduler);
}

inline bool all_at(size_t first, size_t count, State state) {
  for (size_t i = first; i < first + count; ++i) {
    if (fibers[i].state != state) return false;
  }
  return true;
}

inline void release_warp(size_t first) {
  unsigned ballot = 0;
  for (size_t lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(fibers[first + lane].predicate) << lane;
  for (size_t lane = 0; lane < 32; ++lane) {
    fibers[first + lane].ballot = ballot;
    fibers[first + lane].state = kReady;
  }
}

// What the 32 threads of a warp give, by lane. Two buffers in turn: a thread that runs ahead stops at the next barrier.
inline const Exchange* exchange(const void* mine, size_t bytes) {
  std::vector<Exchange>& all = exchanged[fibers[threadIdx.x].exchanges++ % 2];
  memcpy(all[threadIdx.x].bytes, mine, bytes);
  wait_at(kAtWarpBarrier);
  return &all[threadIdx.x / 32 * 32];
}

// The dynamic shared memory: no number in it is finite before a block writes one, and what follows it is guarded.
inline char* dynamic_memory() { return reinterpret_cast<char*>(dynamic.data()); }
constexpr size_t kGuard = 256;

inline void fill_dynamic() {
  dynamic.resize((dynamic_bytes + kGuard + sizeof(uint4) - 1) / sizeof(uint4));
  memset(dynamic.data(), 0xff, dynamic.size() * sizeof(uint4));
}

inline void check_dynamic() {
  for (size_t i = 0; i < kGuard; ++i) {
    if (dynamic_memory()[dynamic_bytes + i] != static_cast<char>(0xff)) fail("write behind the shared memory");
  }
}

// Run a warp as far as it gets without the others: what a missing barrier of the block leaves undone is then seen.
inline bool run_warp(size_t first) {
  for (bool ran = false;; ran = true) {
    bool ready = false;
    for (size_t i = first; i < first + 32; ++i) {
      threadIdx.x = static_cast<unsigned>(i);
      if (fibers[i].state != kReady) continue;
      ready = true;
      swapcontext(&scheduler, &fibers[i].context);
    }
    if (all_at(first, 32, kAtWarpBarrier)) {
      release_warp(first);
    } else if (!ready) {
      return ran;
    }
  }
}

inline void run_block(size_t threads) {
  fibers.assign(threads, Fiber());
  for (std::vector<Exchange>& all : exchanged) all.resize(threads);
  fill_dynamic();
  stacks.resize(threads, std::vector<char>(1 << 16));
  for (size_t i = 0; i < threads; ++i) {
    ucontext_t& context = fibers[i].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i].data();
    context.uc_stack.ss_size = stacks[i].size();
    context.uc_link = &scheduler;
    makecontext(&context, run_fiber, 0);
  }
  for (;;) {
    bool ran = false;
    for (size_t i = 0; i < threads; i += 32) ran |= run_warp(blockIdx.x % 2 ? threads - 32 - i : i);
    if (all_at(0, threads, kDone)) return check_dynamic();
    if (all_at(0, threads, kAtBlockBarrier)) {
      for (Fiber& fiber : fibers) fiber.state = kReady;
    } else if (!ran) {
      fail("threads wait at different barriers");
    }
  }
}

template <typename Kernel>
struct Launch {
  Kernel function;
  unsigned blocks, threads;
  size_t bytes;
  bool begins_early = false;

  template <typename... Arguments>
  void operator()(Arguments... arguments) {
    if (blocks == 0) fail("launch of no blocks");
    gridDim.x = blocks;
    dynamic_bytes = bytes;
    early = begins_early;
    kernel = [=] { function(arguments...); };
    for (unsigned block = 0; block < blocks; ++block) {
      blockIdx.x = block;
      run_block(threads);
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(Kernel function, unsigned blocks, unsigned threads, size_t bytes, cudaStream_t) {
  return Launch<Kernel>{function, blocks, threads, bytes};
}

}  // namespace host

inline void __syncthreads() { host::wait_at(host::kAtBlockBarrier); }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  int id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// One kernel after the other, also where a launch may begin early.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  auto launch =
      host::launch(kernel, config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, config->stream);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    launch.begins_early |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                           config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  launch(arguments...);
  return cudaSuccess;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  host::fibers[threadIdx.x].predicate = predicate;
  host::wait_at(host::kAtWarpBarrier);
  return host::fibers[threadIdx.x].ballot;
}

inline uint32_t __shfl_up_sync(unsigned, uint32_t value, unsigned delta) {
  const host::Exchange* const all = host::exchange(&value, sizeof value);
  const unsigned lane = threadIdx.x % 32;
  if (lane >= delta) memcpy(&value, all[lane - delta].bytes, sizeof value);
  return value;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to += value;
  return before;
}

[[noreturn]] inline void __trap() { host::fail("trap"); }

inline int __popc(uint32_t word) { return __builtin_popcount(word); }

template <typename T>
T __ldg(const T* from) {
  host::check_alignment(from, alignof(T));
  host::check_wait();
  return *from;
}

template <typename T>
T __ldcg(const T* from) {
  host::check_alignment(from, alignof(T));
  return *from;
}

template <typename T>
T __ldcs(const T* from) {
  host::check_alignment(from, alignof(T));
  return *from;
}

template <typename T>
void __stwb(T* to, T value) {
  host::check_alignment(to, alignof(T));
  *to = value;
}
