// What the CUDA sources of N:M sparse matrices share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "slope_common.h"

namespace ds_efficient {
namespace slope {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <typename T>
constexpr int kPerVector = kVector / static_cast<int>(sizeof(T));

inline bool aligned(const void* pointer, int64_t row_bytes, int to) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(to) == 0 && row_bytes % to == 0;
}

// Blocks for `wanted` pieces of work; the kernels loop, so that fewer blocks do as well.
inline unsigned blocks_for(int64_t wanted) {
  const int64_t most = 0x7fffffff;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

}  // namespace slope
}  // namespace ds_efficient
