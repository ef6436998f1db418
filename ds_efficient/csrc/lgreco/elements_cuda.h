// Elements of gradients on CUDA devices, four at a time, so that a warp reads and writes whole lines of memory.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <sm_30_intrinsics.h>

#include <cstdint>

#include "elements.h"

namespace ds_efficient {
namespace lgreco {

struct Float32 {
  using Stored = uint32_t;
  static __device__ __forceinline__ float load(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t store(float value) { return static_cast<uint32_t>(keyed::bits_of(value)); }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return float_of_bfloat16(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return bfloat16_of(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ uint16_t store(float value) {
    return value == value ? __half_as_ushort(__float2half_rn(value)) : static_cast<uint16_t>(0x7e00);
  }
};

// Four elements as they lie in memory.
template <typename Stored>
struct FourBits;
template <>
struct FourBits<uint32_t> {
  using Type = uint4;
};
template <>
struct FourBits<uint16_t> {
  using Type = uint2;
};
template <typename Stored>
union Four {
  typename FourBits<Stored>::Type wide;
  Stored one[4];
};

template <typename Stored>
__device__ __forceinline__ Four<Stored> load_wide(const Stored* from) {
  Four<Stored> made;
  made.wide = *reinterpret_cast<const typename FourBits<Stored>::Type*>(from);
  return made;
}

// `valid` of the four exist, at least one; the others repeat the first. `wide`: the address suits a load of all.
template <typename Stored>
__device__ __forceinline__ Four<Stored> load_four(const Stored* from, int valid, bool wide) {
  if (wide && valid == 4) return load_wide(from);
  Four<Stored> made;
#pragma unroll
  for (int i = 0; i < 4; ++i) made.one[i] = from[i < valid ? i : 0];
  return made;
}

template <typename Stored>
__device__ __forceinline__ void store_wide(Stored* to, const Four<Stored>& in) {
  *reinterpret_cast<typename FourBits<Stored>::Type*>(to) = in.wide;
}

template <typename Stored>
__device__ __forceinline__ void store_four(Stored* to, int valid, bool wide, const Four<Stored>& in) {
  if (wide && valid == 4) {
    store_wide(to, in);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) to[i] = in.one[i];
    }
  }
}

template <typename Stored>
bool is_wide(const Stored* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(typename FourBits<Stored>::Type) == 0;
}

__device__ __forceinline__ float from_lane_across(float value, int mask) {
  return __uint_as_float(__shfl_xor_sync(0xffffffffu, static_cast<uint32_t>(keyed::bits_of(value)), mask));
}

// The smaller and the larger of two numbers, one instruction each; where one is NaN the other.
__device__ __forceinline__ float smaller_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return __builtin_fminf(a, b);
#endif
}
__device__ __forceinline__ float larger_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return __builtin_fmaxf(a, b);
#endif
}

// work.run<Element>() for the element type of a dtype, on a device.
template <typename Work>
cudaError_t with_element(const Work& work, int dtype, int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case kFloat32: return work.template run<Float32>();
    case kBfloat16: return work.template run<Bfloat16>();
    case kFloat16: return work.template run<Float16>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace lgreco
}  // namespace ds_efficient
