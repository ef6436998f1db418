// Keyed random numbers on CUDA devices; C ABI, no torch headers. See csrc/common/keyed_random.h for the streams.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "keyed_choice_cuda.h"
#include "keyed_random.h"

namespace {

using namespace ds_efficient::keyed;

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct Bits {
  using Out = uint32_t;
  static __device__ __forceinline__ Out convert(uint32_t word) { return word; }
};

template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
  return __float2half_rn(value);
}

__device__ __forceinline__ float clamp_below_one(float value) { return value; }
__device__ __forceinline__ __nv_bfloat16 clamp_below_one(__nv_bfloat16 value) {
  return __ushort_as_bfloat16(below_one(__bfloat16_as_ushort(value), kOneBfloat16));
}
__device__ __forceinline__ __half clamp_below_one(__half value) {
  return __ushort_as_half(below_one(__half_as_ushort(value), kOneFloat16));
}

template <typename T>
struct Uniform {
  using Out = T;
  static __device__ __forceinline__ T convert(uint32_t word) {
    return clamp_below_one(round_to<T>(uniform_from_word(word)));
  }
};

template <typename T>
struct Normal {
  using Out = T;
  static __device__ __forceinline__ T convert(uint32_t word) { return round_to<T>(normal_from_word(word)); }
};

constexpr int kFillThreads = 256;

// Each thread makes whole Philox blocks: 4 elements, one store where `aligned` says that they start at a multiple of
// their size; the first and the last block of the range may be cut.
template <typename Kind>
__global__ void __launch_bounds__(kFillThreads)
    fill_kernel(uint64_t key, uint64_t offset, int64_t n, typename Kind::Out* __restrict__ out, bool aligned) {
  using T = typename Kind::Out;
  struct alignas(4 * sizeof(T)) Quad {
    T value[4];
  };
  const uint64_t first = offset / 4;
  const int64_t skip = static_cast<int64_t>(offset % 4);
  const int64_t blocks = (skip + n + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kFillThreads;
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * kFillThreads + threadIdx.x; b < blocks; b += stride) {
    const Block block = words(key, first + static_cast<uint64_t>(b));
    Quad quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.value[i] = Kind::convert(block.word[i]);
    const int64_t start = 4 * b - skip;
    if (aligned && start >= 0 && start + 4 <= n) {
      *reinterpret_cast<Quad*>(out + start) = quad;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (start + i >= 0 && start + i < n) out[start + i] = quad.value[i];
      }
    }
  }
}

template <typename Kind>
cudaError_t fill(uint64_t key, uint64_t offset, int64_t n, void* out, int device, cudaStream_t stream) {
  using T = typename Kind::Out;
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || n == 0) return error;
  int processors = 0;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (static_cast<int64_t>(offset % 4) + n + 3) / 4;
  const int64_t wanted = (blocks + kFillThreads - 1) / kFillThreads;
  const int64_t most = static_cast<int64_t>(processors) * 32;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) / sizeof(T) - offset) % 4 == 0;
  fill_kernel<Kind><<<static_cast<unsigned>(wanted < most ? wanted : most), kFillThreads, 0, stream>>>(
      key, offset, n, static_cast<T*>(out), aligned);
  return cudaGetLastError();
}

// ---- choice of k of n: one block a row -------------------------------------------------------------------------

__global__ void __launch_bounds__(kRowThreads)
    choice_kernel(uint64_t key, uint64_t first_row, int64_t batch, uint32_t n, uint32_t k, int64_t* __restrict__ out) {
  __shared__ RowShared shared;
  for (int64_t r = blockIdx.x; r < batch; r += gridDim.x) {
    choose_row(key, first_row + static_cast<uint64_t>(r), n, k, out + r * k, shared);
  }
}

}  // namespace

extern "C" {

int ds_efficient_keyed_random_version() { return DS_EFFICIENT_KEYED_RANDOM_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Each returns a cudaError_t. `out` holds n elements on `device`; `offset` is the index of the first one.
int ds_efficient_keyed_bits(uint64_t key, uint64_t offset, int64_t n, void* out, int device, cudaStream_t stream) {
  return fill<Bits>(key, offset, n, out, device, stream);
}

int ds_efficient_keyed_uniform(uint64_t key, uint64_t offset, int64_t n, void* out, int dtype, int device,
                               cudaStream_t stream) {
  switch (dtype) {
    case kFloat32: return fill<Uniform<float>>(key, offset, n, out, device, stream);
    case kBfloat16: return fill<Uniform<__nv_bfloat16>>(key, offset, n, out, device, stream);
    case kFloat16: return fill<Uniform<__half>>(key, offset, n, out, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

int ds_efficient_keyed_normal(uint64_t key, uint64_t offset, int64_t n, void* out, int dtype, int device,
                              cudaStream_t stream) {
  switch (dtype) {
    case kFloat32: return fill<Normal<float>>(key, offset, n, out, device, stream);
    case kBfloat16: return fill<Normal<__nv_bfloat16>>(key, offset, n, out, device, stream);
    case kFloat16: return fill<Normal<__half>>(key, offset, n, out, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

// out (batch, k): row r holds the choice of k of n that belongs to row number first_row + r; 0 <= k <= n < 2^31.
int ds_efficient_keyed_choice(uint64_t key, uint64_t first_row, int64_t batch, int64_t n, int64_t k, int64_t* out,
                              int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || batch == 0 || k == 0) return error;
  const int64_t most = 1 << 20;
  choice_kernel<<<static_cast<unsigned>(batch < most ? batch : most), kRowThreads, 0, stream>>>(
      key, first_row, batch, static_cast<uint32_t>(n), static_cast<uint32_t>(k), out);
  return cudaGetLastError();
}

}  // extern "C"
