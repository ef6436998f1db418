// Launches that begin early: the kernel is brought to the device while the kernel before it in the stream, whatever
// that is, still runs (programmatic stream serialization, compute capability 9.0 and up; elsewhere an ordinary launch).
//
// Such a kernel begins when every block of the one before has ended, or has called let_next_begin. What the one before
// wrote is there only after wait_for_previous. Hence the rules for a kernel of launch_after:
//
//  1. Every thread calls wait_for_previous, also those that return early. The end of the kernel is then the end of all
//     before it, on which the wait of the next one, and of any later one, relies.
//  2. Before the wait it writes no global memory, and reads only what none of the kernels that may still run writes.
//     Those are the one before; where that calls let_next_begin before its own wait, also the one before that; and so
//     on, up to and including the nearest that waits first and then lets the next begin, or never does. All before
//     that one has ended, since its blocks got past their wait.
//  3. It reads before the wait with __ldcg: no wait of this kernel has yet removed from the cache of its multiprocessor
//     what was there before earlier kernels wrote. Elsewhere not with __ldg, which a compiler may move ahead.
//  4. Who lets the next begin knows which kernel that is. The last kernel of a call, followed by anybody's, never does.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace ds_efficient {
namespace launches {

constexpr int kFirstEarly = 90;   // the first virtual architecture that knows the wait, times ten
constexpr int kKnownDevices = 64;  // devices beyond are asked about in every call

// From here on the next kernel of the stream may begin, as soon as all blocks have come here and there is room.
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the end of the kernel before, where this one began early: what that wrote can be seen from here on.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether the code of kKernel that `device`, the current one, runs has the wait in it. The capability of the device
// does not tell: it also runs what was made from the PTX of an older architecture, without the wait. Static, so that
// another library with a kernel of this name keeps answers of its own.
template <auto kKernel>
static cudaError_t begins_early(int device, bool* early) {
  enum : signed char { kUnknown, kNo, kYes };
  static std::atomic<signed char> known[kKnownDevices] = {};  // of this kernel; threads that ask at once find the same
  const bool remembered = device >= 0 && device < kKnownDevices;
  signed char answer = remembered ? known[device].load(std::memory_order_relaxed) : kUnknown;
  if (answer == kUnknown) {
    cudaFuncAttributes attributes{};
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernel);
    if (error != cudaSuccess) return error;
    answer = attributes.ptxVersion >= kFirstEarly ? kYes : kNo;
    if (remembered) known[device].store(answer, std::memory_order_relaxed);
  }
  *early = answer == kYes;
  return cudaSuccess;
}

// Launch kKernel, which keeps to the rules above, on `device`, the current one.
template <auto kKernel, typename... Arguments>
static cudaError_t launch_after(int64_t blocks, int threads, int device, cudaStream_t stream,
                                const Arguments&... arguments) {
  bool early = false;
  cudaError_t error = begins_early<kKernel>(device, &early);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kKernel, arguments...);
  }
  if (error != cudaSuccess) cudaGetLastError();  // returned here, and not once more by whoever asks next
  return error;
}

}  // namespace launches
}  // namespace ds_efficient
