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

// Loads and stores of 8 or 16 bytes at once. Those to global memory are intrinsics: left to itself, the compiler splits
// some stores into elements.
template <int kBytes>
struct Register;
template <>
struct Register<8> {
  using type = uint2;
};
template <>
struct Register<16> {
  using type = uint4;
};

template <typename Pack>
__device__ __forceinline__ Pack load_pack(const void* from) {
  const auto bits = *static_cast<const typename Register<sizeof(Pack)>::type*>(from);
  Pack pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

template <typename Pack>
__device__ __forceinline__ void store_pack(void* to, const Pack& pack) {
  typename Register<sizeof(Pack)>::type bits;
  memcpy(&bits, &pack, sizeof pack);
  *static_cast<typename Register<sizeof(Pack)>::type*>(to) = bits;
}

template <typename Pack>
__device__ __forceinline__ void store_pack_global(void* to, const Pack& pack) {
  typename Register<sizeof(Pack)>::type bits;
  memcpy(&bits, &pack, sizeof pack);
  __stwb(static_cast<typename Register<sizeof(Pack)>::type*>(to), bits);
}

constexpr int64_t kMostBlocks = 0x7fffffff;

// Where a warp works: kWarps rows a block, `across` blocks side by side for as many stretches of a row.
struct Place {
  int64_t row, stretch;
};

__device__ __forceinline__ Place place_of_warp(uint32_t across) {
  return Place{int64_t{blockIdx.x / across} * kWarps + threadIdx.x / 32, blockIdx.x % across};
}

inline int64_t blocks_of(int64_t rows, int64_t across) { return across * ceil_div(rows, kWarps); }

}  // namespace slope
}  // namespace ds_efficient
