// What the CUDA sources of the random sketches share: number types and words of the key.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "rmm_common.h"

namespace ds_efficient {
namespace rmm {

constexpr int64_t kMostBlocks = 0x7fffffff;

DS_EFFICIENT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// X: `stride` elements from row to row.
struct Rows {
  const void* data;
  int64_t stride, features;
};

// 16-bit numbers by their bits.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Bfloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Nearest number of a type, ties to even.
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Bfloat16 round_to<Bfloat16>(float value) {
  return Bfloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ Float16 round_to<Float16>(float value) {
  return Float16{__half_as_ushort(__float2half_rn(value))};
}

template <typename T>
__device__ __forceinline__ T load_one(const T* from);
template <>
__device__ __forceinline__ float load_one<float>(const float* from) {
  return __ldg(from);
}
template <>
__device__ __forceinline__ Bfloat16 load_one<Bfloat16>(const Bfloat16* from) {
  return Bfloat16{__ldg(&from->bits)};
}
template <>
__device__ __forceinline__ Float16 load_one<Float16>(const Float16* from) {
  return Float16{__ldg(&from->bits)};
}

// word_at of rmm_common.h without an array that is indexed at run time.
__device__ __forceinline__ uint32_t one_word(uint64_t key, uint64_t index) {
  const keyed::Block block = keyed::words(key, index / 4);
  const uint32_t low = index & 1 ? block.word[1] : block.word[0], high = index & 1 ? block.word[3] : block.word[2];
  return index & 2 ? high : low;
}

}  // namespace rmm
}  // namespace ds_efficient
