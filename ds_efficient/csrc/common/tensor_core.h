// Tensor cores, shared memory and 16-bit numbers of CUDA devices of compute capability 8.0 and newer, as functions:
// what of the kernels is written in PTX or needs the toolkit's 16-bit types. tests/cuda_on_host has the same functions
// for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ds_efficient {

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

// The dynamic shared memory of the block, aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 ds_efficient_dynamic_shared[];
  return reinterpret_cast<char*>(ds_efficient_dynamic_shared);
}

// Asynchronous copy of 16 bytes from global to shared memory past the L1 cache, both aligned: `bytes` of them are read,
// the rest are 0. To be committed and waited for as the copies of cuda_pipeline.h, which want `bytes` at compile time.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" : : "r"(address), "l"(global), "r"(bytes) : "memory");
}

// Four 8x8 matrices of 16-bit numbers in shared memory, transposed: lane l gives the address of row l % 8 of matrix
// l / 8 and gets elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4) of matrix i in part[i].
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&part)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
}

// sum (16x8) += a (16x16) b (16x8), float32 sums. With g = lane / 4 and t = lane % 4 a lane holds rows g, g + 8 of a:
// columns 2t, 2t + 1 in a[0], a[1], columns 2t + 8, 2t + 9 in a[2], a[3]; column g of b: rows 2t, 2t + 1 in b0, rows
// 2t + 8, 2t + 9 in b1; columns 2t, 2t + 1 of the sum: row g in sum[0], sum[1], row g + 8 in sum[2], sum[3].
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<Bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace ds_efficient
