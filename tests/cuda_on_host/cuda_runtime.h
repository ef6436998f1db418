// The part of CUDA that this project's kernels use, on the host: a block at a time, its threads as fibers that run
// from barrier to barrier. For tests of the kernels' arithmetic where there is no GPU; tells nothing about races.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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

namespace host {

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "CUDA on the host: %s\n", why);
  abort();
}

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("misaligned access");
}

enum State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };
struct Fiber {
  ucontext_t context;
  State state = kReady;
  bool predicate = false;
  unsigned ballot = 0;
};
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<char>> stacks;
inline std::function<void()> kernel;
inline ucontext_t scheduler;

inline void run_fiber() {
  kernel();
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

inline void run_block(size_t threads) {
  fibers.assign(threads, Fiber());
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
    for (size_t i = 0; i < threads; ++i) {
      threadIdx.x = static_cast<unsigned>(i);
      if (fibers[i].state == kReady) swapcontext(&scheduler, &fibers[i].context);
    }
    if (all_at(0, threads, kDone)) return;
    bool released = false;
    if (all_at(0, threads, kAtBlockBarrier)) {
      for (Fiber& fiber : fibers) fiber.state = kReady;
      released = true;
    }
    for (size_t first = 0; first < threads; first += 32) {
      if (all_at(first, 32, kAtWarpBarrier)) {
        release_warp(first);
        released = true;
      }
    }
    if (!released) fail("threads wait at different barriers");
  }
}

template <typename Kernel>
struct Launch {
  Kernel function;
  unsigned blocks, threads;

  template <typename... Arguments>
  void operator()(Arguments... arguments) {
    if (blocks == 0) fail("launch of no blocks");
    gridDim.x = blocks;
    kernel = [=] { function(arguments...); };
    for (unsigned block = 0; block < blocks; ++block) {
      blockIdx.x = block;
      run_block(threads);
    }
  }
};

template <typename Kernel>
Launch<Kernel> launch(Kernel function, unsigned blocks, unsigned threads, int, cudaStream_t) {
  return Launch<Kernel>{function, blocks, threads};
}

}  // namespace host

inline void __syncthreads() { host::wait_at(host::kAtBlockBarrier); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
  host::fibers[threadIdx.x].predicate = predicate;
  host::wait_at(host::kAtWarpBarrier);
  return host::fibers[threadIdx.x].ballot;
}

template <typename T>
T __ldg(const T* from) {
  host::check_alignment(from, alignof(T));
  return *from;
}

template <typename T>
void __stwb(T* to, T value) {
  host::check_alignment(to, alignof(T));
  *to = value;
}
