// Random sketches on CUDA devices: the generated S, and a choice of rows. No torch headers.
#include <cstring>

#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

constexpr int kThreads = 256;
constexpr int kVector = 16;  // bytes of the widest load or store
constexpr int kChunk = 8;    // columns of S that a thread makes at a time

// ---- packs of 16 bytes -----------------------------------------------------------------------------------------

template <typename T>
struct alignas(kVector) Pack {
  static constexpr int kCount = kVector / static_cast<int>(sizeof(T));
  T value[kCount];
};

inline bool aligned(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % kVector == 0 && row_bytes % kVector == 0;
}

// A pack of a row from `column` on; elements from `columns` on are 0. `vector`: its address is a multiple of 16.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t columns, bool vector) {
  Pack<T> pack;
  if (vector && column + Pack<T>::kCount <= columns) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row + column));
    memcpy(&pack, &bits, sizeof pack);
  } else {
#pragma unroll
    for (int e = 0; e < Pack<T>::kCount; ++e) pack.value[e] = column + e < columns ? load_one(row + column + e) : T{};
  }
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* row, int64_t column, int64_t columns, bool vector, const Pack<T>& pack) {
  if (vector && column + Pack<T>::kCount <= columns) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    __stwb(reinterpret_cast<uint4*>(row + column), bits);
  } else {
#pragma unroll
    for (int e = 0; e < Pack<T>::kCount; ++e) {
      if (column + e < columns) row[column + e] = pack.value[e];
    }
  }
}

// ---- unit elements ---------------------------------------------------------------------------------------------

__device__ __forceinline__ float signed_one(bool negative, float) { return negative ? -1.0f : 1.0f; }
__device__ __forceinline__ Bfloat16 signed_one(bool negative, Bfloat16) {
  return Bfloat16{static_cast<uint16_t>(negative ? 0xbf80 : 0x3f80)};
}
__device__ __forceinline__ Float16 signed_one(bool negative, Float16) {
  return Float16{static_cast<uint16_t>(negative ? 0xbc00 : 0x3c00)};
}

// Normals first .. first + kChunk - 1 of the stream.
template <typename T>
__device__ __forceinline__ void make_normals(uint64_t key, uint64_t first, T (&made)[kChunk]) {
  uint32_t word[kChunk];
  if (first % 4 == 0) {
#pragma unroll
    for (int half = 0; half < kChunk / 4; ++half) {
      const keyed::Block block = keyed::words(key, first / 4 + half);
#pragma unroll
      for (int e = 0; e < 4; ++e) word[4 * half + e] = block.word[e];
    }
  } else {  // only where p is no multiple of 4: blocks of a few rows
#pragma unroll
    for (int e = 0; e < kChunk; ++e) word[e] = one_word(key, first + e);
  }
#pragma unroll
  for (int e = 0; e < kChunk; ++e) made[e] = round_to<T>(keyed::normal_from_word(word[e]));
}

// kChunk columns of row q of the segment from `column` on, a multiple of kChunk; those from `projected` on are anything.
template <int kSketch, typename T>
__device__ __forceinline__ void make_units(const Units& units, uint64_t key, const int64_t* chosen, int64_t q,
                                           int64_t column, T (&made)[kChunk]) {
  [[maybe_unused]] const uint64_t row = static_cast<uint64_t>(q);
  [[maybe_unused]] const uint64_t global = static_cast<uint64_t>(units.base_row) + row;
  if constexpr (kSketch == kGaussian) {
    make_normals(key, units.before + row * static_cast<uint64_t>(units.projected) + column, made);
  } else if constexpr (kSketch == kRademacher) {
    const uint64_t first = units.before + row * static_cast<uint64_t>(sign_words(units.projected));
    const uint32_t word = one_word(key, first + column / 32) >> (column & 31);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) made[e] = signed_one((word >> e) & 1u, T{});
  } else if constexpr (kSketch == kSrht) {
    const int64_t block = q / units.block, local = q - block * units.block;
    const bool sign = negative_bit(one_word(key, global / 32), global & 31);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      const int64_t place = column + e < units.projected ? column + e : 0;
      const bool negative = hadamard_negative(local, __ldg(chosen + block * units.projected + place));
      made[e] = signed_one(sign != negative, T{});
    }
  } else {
    const uint32_t word = one_word(key, global);
    const int64_t place = count_column(word, units.projected) - column;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) made[e] = place == e ? signed_one(count_negative(word), T{}) : T{};
  }
}

template <int kSketch, typename T>
__global__ void __launch_bounds__(kThreads)
    matrix_kernel(const Units units, uint64_t key, const int64_t* __restrict__ chosen, T* __restrict__ out,
                  bool vector) {
  const int64_t chunks = ceil_div(units.projected, kChunk), total = units.rows * chunks;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < total; p += stride) {
    const int64_t row = p / chunks, column = p % chunks * kChunk;
    T made[kChunk];
    make_units<kSketch>(units, key, chosen, units.first + row, column, made);
#pragma unroll
    for (int part = 0; part < kChunk; part += Pack<T>::kCount) {
      Pack<T> pack;
#pragma unroll
      for (int e = 0; e < Pack<T>::kCount; ++e) pack.value[e] = made[part + e];
      store_pack(out + row * units.projected, column + part, units.projected, vector, pack);
    }
  }
}

template <int kSketch, typename T>
cudaError_t fill(const Units& units, uint64_t key, const int64_t* chosen, void* out, cudaStream_t stream) {
  const int64_t wanted = ceil_div(units.rows * ceil_div(units.projected, kChunk), kThreads);
  const int64_t blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  const bool vector = aligned(out, units.projected * int64_t{sizeof(T)});
  matrix_kernel<kSketch, T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(units, key, chosen,
                                                                                    static_cast<T*>(out), vector);
  return cudaGetLastError();
}

template <typename T>
cudaError_t matrix(const Units& units, uint64_t key, const int64_t* chosen, void* out, cudaStream_t stream) {
  switch (units.sketch) {
    case kGaussian: return fill<kGaussian, T>(units, key, chosen, out, stream);
    case kRademacher: return fill<kRademacher, T>(units, key, chosen, out, stream);
    case kSrht: return fill<kSrht, T>(units, key, chosen, out, stream);
    case kCount: return fill<kCount, T>(units, key, chosen, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

// ---- rows ------------------------------------------------------------------------------------------------------

struct Choice {
  int64_t block, projected;
  const int64_t* chosen;
  int64_t blocks;
};

// A thread takes 16 bytes of a chosen row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const Rows x, const Choice choice, int64_t vectors, float scale, T* __restrict__ out, bool vector_x,
                bool vector_out) {
  const int64_t total = choice.blocks * choice.projected * vectors;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < total; p += stride) {
    const int64_t made = p / vectors, feature = p % vectors * Pack<T>::kCount;
    const int64_t row = made / choice.projected * choice.block + __ldg(choice.chosen + made);
    Pack<T> pack = load_pack(static_cast<const T*>(x.data) + row * x.stride, feature, x.features, vector_x);
#pragma unroll
    for (int e = 0; e < Pack<T>::kCount; ++e) pack.value[e] = round_to<T>(to_float(pack.value[e]) * scale);
    store_pack(out + made * x.features, feature, x.features, vector_out, pack);
  }
}

template <typename T>
cudaError_t choose_rows(const Rows& x, const Choice& choice, float scale, void* out, cudaStream_t stream) {
  const int64_t vectors = ceil_div(x.features * int64_t{sizeof(T)}, kVector);
  const int64_t wanted = ceil_div(choice.blocks * choice.projected * vectors, kThreads);
  const int64_t blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  rows_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      x, choice, vectors, scale, static_cast<T*>(out), aligned(x.data, x.stride * int64_t{sizeof(T)}),
      aligned(out, x.features * int64_t{sizeof(T)}));
  return cudaGetLastError();
}

}  // namespace
}  // namespace rmm
}  // namespace ds_efficient

extern "C" {

using namespace ds_efficient;

int ds_efficient_rmm_version() { return DS_EFFICIENT_RMM_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Each returns a cudaError_t; see rmm_common.h.

int ds_efficient_rmm_matrix(uint64_t key, const rmm::Units* units, const int64_t* chosen, void* out, int device,
                            cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || units->rows == 0 || units->projected == 0) return error;
  switch (units->dtype) {
    case rmm::kFloat32: return rmm::matrix<float>(*units, key, chosen, out, stream);
    case rmm::kBfloat16: return rmm::matrix<rmm::Bfloat16>(*units, key, chosen, out, stream);
    case rmm::kFloat16: return rmm::matrix<rmm::Float16>(*units, key, chosen, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

int ds_efficient_rmm_rows(const void* x, int64_t stride, int64_t features, int64_t block, int64_t projected,
                          const int64_t* chosen, int64_t blocks, double scale, void* out, int dtype, int device,
                          cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || blocks == 0 || projected == 0 || features == 0) return error;
  const rmm::Rows rows{x, stride, features};
  const rmm::Choice choice{block, projected, chosen, blocks};
  const float factor = static_cast<float>(scale);
  switch (dtype) {
    case rmm::kFloat32: return rmm::choose_rows<float>(rows, choice, factor, out, stream);
    case rmm::kBfloat16: return rmm::choose_rows<rmm::Bfloat16>(rows, choice, factor, out, stream);
    case rmm::kFloat16: return rmm::choose_rows<rmm::Float16>(rows, choice, factor, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
