// Gradients of layers become preconditioned gradients of the same norm, many layers in two launches. No torch headers.
//
// A layer is one tensor or several (weight and bias): G, and P of the same shapes. With the sums over all its tensors
//
//   G <- P |G| / |P|     where <G, P> > 0 and the factor is a positive finite number, else G stays.
//
// P may be given as what is to be subtracted from G. Memory traffic: G and what gives P are read for the sums, then
// what gives P is read again and G written. Sums are float64 of every element, in a fixed order. Where the device can,
// each kernel begins while the one before is ending (launch.h), and touches no global memory before it has waited.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "launch.h"
#include "mkor_common.h"
#include "mkor_cuda.h"

namespace ds_efficient {
namespace mkor {
namespace {

constexpr int kMostTensors = 80;  // of a launch: the table is an argument, of which 4 KiB are allowed
constexpr int64_t kLeast = 16384;  // elements of a part, where a tensor has as many
constexpr int64_t kMostParts = 512;  // of a tensor
constexpr int kAhead = 4;  // steps whose loads are on their way together

struct Tensor {
  void* gradient;
  const void* product;
  int64_t count, part;               // elements, and elements of a part
  int32_t first_part;                // of the launch
  int32_t layer_first, layer_parts;  // parts of its layer
  int32_t layer;
};

struct Table {
  Tensor tensor[kMostTensors];
  int32_t count;
};

__device__ __forceinline__ const Tensor& tensor_of(const Table& table, int part) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.tensor[middle].first_part <= part) low = middle; else high = middle;
  }
  return table.tensor[low];
}

// Elements of a block.
struct Range {
  int64_t begin, end;
  bool vector;
};

template <typename T>
__device__ __forceinline__ Range range_of(const Tensor& tensor) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - tensor.first_part) * tensor.part;
  const int64_t end = begin + tensor.part < tensor.count ? begin + tensor.part : tensor.count;
  const uintptr_t places = reinterpret_cast<uintptr_t>(tensor.gradient) | reinterpret_cast<uintptr_t>(tensor.product);
  return Range{begin, end, places % 16 == 0};  // parts are multiples of 8 elements
}

template <typename T>
__device__ __forceinline__ uint4 load_vector(const T* from, int64_t place, const Range& range) {
  constexpr int kVector = Share<T>::kVector;
  if (range.vector && place + kVector <= range.end) return *reinterpret_cast<const uint4*>(from + place);
  T value[kVector];
#pragma unroll
  for (int e = 0; e < kVector; ++e) value[e] = place + e < range.end ? from[place + e] : T{};
  uint4 bits;
  memcpy(&bits, value, sizeof bits);
  return bits;
}

// The sums of a block's threads, in thread 0 of the result.
__device__ __forceinline__ void block_sums(double (&part)[3][kThreads]) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < 3; ++i) part[i][thread] += part[i][thread + half];
    }
  }
  __syncthreads();
}

// |G|^2, |P|^2 and <G, P> of a part.
template <typename T>
__global__ void __launch_bounds__(kThreads) part_sums_kernel(const Table table, bool subtract, double* partial) {
  constexpr int kVector = Share<T>::kVector;
  __shared__ double part[3][kThreads];
  launches::wait_for_previous();
  launches::let_next_begin();
  const Tensor& tensor = tensor_of(table, static_cast<int>(blockIdx.x));
  const Range range = range_of<T>(tensor);
  const T* const gradient = static_cast<const T*>(tensor.gradient);
  const T* const product = static_cast<const T*>(tensor.product);
  const int thread = static_cast<int>(threadIdx.x);
  double sums[3] = {};
  for (int64_t first = range.begin + thread * kVector; first < range.end; first += kAhead * kThreads * kVector) {
    uint4 g_bits[kAhead], p_bits[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t place = first + i * (kThreads * kVector);
      g_bits[i] = place < range.end ? load_vector(gradient, place, range) : uint4{};
      p_bits[i] = place < range.end ? load_vector(product, place, range) : uint4{};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float g[kVector], p[kVector];
      unpack<T>(g_bits[i], g);
      unpack<T>(p_bits[i], p);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const double a = static_cast<double>(g[e]), b = static_cast<double>(subtract ? g[e] - p[e] : p[e]);
        sums[0] += a * a;
        sums[1] += b * b;
        sums[2] += a * b;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) part[i][thread] = sums[i];
  block_sums(part);
  if (thread < 3) partial[3 * static_cast<int64_t>(blockIdx.x) + thread] = part[thread][0];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) apply_kernel(const Table table, bool subtract, const double* partial,
                                                             double* sums) {
  constexpr int kVector = Share<T>::kVector;
  __shared__ double part[3][kThreads];
  const Tensor& tensor = tensor_of(table, static_cast<int>(blockIdx.x));
  const Range range = range_of<T>(tensor);
  T* const gradient = static_cast<T*>(tensor.gradient);
  const T* const product = static_cast<const T*>(tensor.product);
  const int thread = static_cast<int>(threadIdx.x);
  launches::wait_for_previous();
  double mine[3] = {};
  for (int i = thread; i < tensor.layer_parts; i += kThreads) {
#pragma unroll
    for (int j = 0; j < 3; ++j) mine[j] += partial[3 * static_cast<int64_t>(tensor.layer_first + i) + j];
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) part[j][thread] = mine[j];
  block_sums(part);
  const double g_square = part[0][0], p_square = part[1][0], inner = part[2][0];
  if (static_cast<int>(blockIdx.x) == tensor.layer_first && thread < 3) {
    sums[3 * static_cast<int64_t>(tensor.layer) + thread] = part[thread][0];
  }
  const double wanted = sqrt(g_square / p_square);
  if (!(inner > 0.0 && wanted > 0.0 && wanted <= 3.4e38)) return;  // so it is for NaN
  const float scale = static_cast<float>(wanted), most = 3.38e38f;
  for (int64_t place = range.begin + thread * kVector; place < range.end; place += kThreads * kVector) {
    float p[kVector];
    T made[kVector];
    unpack<T>(load_vector(product, place, range), p);
    if (subtract) {
      float g[kVector];
      unpack<T>(load_vector(static_cast<const T*>(gradient), place, range), g);
#pragma unroll
      for (int e = 0; e < kVector; ++e) p[e] = g[e] - p[e];
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) made[e] = round_to<T>(fminf(fmaxf(p[e] * scale, -most), most));
    if (range.vector && place + kVector <= range.end) {
      uint4 bits;
      memcpy(&bits, made, sizeof bits);
      *reinterpret_cast<uint4*>(gradient + place) = bits;
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        if (place + e < range.end) gradient[place + e] = made[e];
      }
    }
  }
}

template <typename T>
cudaError_t run_table(const Table& table, int parts, bool subtract, double* partial, double* sums, int device,
                      cudaStream_t stream) {
  const cudaError_t error =
      launches::launch_after<part_sums_kernel<T>>(parts, kThreads, device, stream, table, subtract, partial);
  if (error != cudaSuccess) return error;
  return launches::launch_after<apply_kernel<T>>(parts, kThreads, device, stream, table, subtract, partial, sums);
}

}  // namespace
}  // namespace mkor
}  // namespace ds_efficient

extern "C" {

using namespace ds_efficient;

// Parts of a tensor of n elements: each needs 3 doubles of scratch memory.
int64_t ds_efficient_mkor_parts(int64_t n) {
  return std::max<int64_t>(1, std::min(mkor::kMostParts, (n + mkor::kLeast - 1) / mkor::kLeast));
}

// gradients, products, sizes: of each tensor the addresses and the number of elements; counts: tensors of each layer in
// turn, at most 80. All in host memory. subtract: the products are to be subtracted from the gradients. On the device:
// sums, 3 doubles a layer, |G|^2, |P|^2, <G, P>; partial, 3 doubles a part. Returns a cudaError_t.
int ds_efficient_mkor_rescale(void* const* gradients, const void* const* products, const int64_t* sizes,
                              const int64_t* counts, int64_t layers, double* sums, double* partial, int subtract,
                              int dtype, int device, cudaStream_t stream) {
  cudaError_t error = cudaSetDevice(device);
  if (dtype < mkor::kFloat32 || dtype > mkor::kFloat16) return cudaErrorInvalidValue;
  int64_t tensor = 0, layer = 0;
  while (layer < layers && error == cudaSuccess) {
    mkor::Table table;
    memset(&table, 0, sizeof table);
    int64_t parts = 0;
    for (; layer < layers && table.count + counts[layer] <= mkor::kMostTensors; ++layer) {
      const int64_t layer_first = parts, first = table.count;
      for (int64_t i = 0; i < counts[layer]; ++i, ++tensor, ++table.count) {
        const int64_t mine = ds_efficient_mkor_parts(sizes[tensor]);
        table.tensor[table.count] = mkor::Tensor{gradients[tensor], products[tensor], sizes[tensor],
                                                 ((sizes[tensor] + mine - 1) / mine + 7) / 8 * 8,
                                                 static_cast<int32_t>(parts), static_cast<int32_t>(layer_first), 0,
                                                 static_cast<int32_t>(layer)};
        parts += mine;
      }
      for (int64_t i = first; i < table.count; ++i) {
        table.tensor[i].layer_parts = static_cast<int32_t>(parts - layer_first);
      }
    }
    if (table.count == 0) return cudaErrorInvalidValue;  // a layer of more tensors than a launch takes
    const auto run = dtype == mkor::kFloat32    ? mkor::run_table<float>
                     : dtype == mkor::kBfloat16 ? mkor::run_table<mkor::Bfloat16>
                                                : mkor::run_table<mkor::Float16>;
    error = run(table, static_cast<int>(parts), subtract != 0, partial, sums, device, stream);
    partial += 3 * parts;
  }
  return error;
}

}  // extern "C"
