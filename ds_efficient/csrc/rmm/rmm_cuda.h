// What the CUDA sources of the random sketches share: elements of S from the key, packs, entry points.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "rmm_common.h"
#include "tensor_core.h"

namespace ds_efficient {
namespace rmm {

constexpr int kVector = 16;            // bytes of the widest load or store
constexpr int kChunk = 8;              // columns of S that a thread makes at a time
constexpr int kGiven = -1;             // in the place of a sketch: S is read from memory
constexpr int64_t kMostBlocks = 0x7fffffff;

DS_EFFICIENT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int64_t row_bytes, int to) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(to) == 0 && row_bytes % to == 0;
}

// A segment of blocks as rmm_common.h has it. `matrix` only for kGiven: its unit elements, (rows, projected).
struct Segment {
  uint64_t key;
  int64_t base_row;
  uint64_t before;
  int64_t block, projected;
  const int64_t* chosen;
  int64_t blocks;
  const void* matrix;
};

// X or the result: `stride` elements from row to row.
struct Rows {
  const void* data;
  int64_t stride, features;
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T value[kCount];
};

template <int kBytes>
struct Register;
template <>
struct Register<4> {
  using type = uint32_t;
};
template <>
struct Register<8> {
  using type = uint2;
};
template <>
struct Register<16> {
  using type = uint4;
};

// Loads and stores of global memory that are not split into elements.
template <typename Pack>
__device__ __forceinline__ Pack load_pack(const void* from) {
  const auto bits = __ldg(static_cast<const typename Register<sizeof(Pack)>::type*>(from));
  Pack pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}

template <typename Pack>
__device__ __forceinline__ void store_pack(void* to, const Pack& pack) {
  typename Register<sizeof(Pack)>::type bits;
  memcpy(&bits, &pack, sizeof pack);
  __stwb(static_cast<typename Register<sizeof(Pack)>::type*>(to), bits);
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

// kCount elements of a row from `column` on; those from `columns` on are 0. `vector`: the address is a multiple of the
// pack's size.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_columns(const T* row, int64_t column, int64_t columns, bool vector) {
  if (vector && column + kCount <= columns) return load_pack<Pack<T, kCount>>(row + column);
  Pack<T, kCount> pack;
#pragma unroll
  for (int e = 0; e < kCount; ++e) pack.value[e] = column + e < columns ? load_one(row + column + e) : T{};
  return pack;
}

template <typename T, int kCount>
__device__ __forceinline__ void store_columns(T* row, int64_t column, int64_t columns, bool vector,
                                              const Pack<T, kCount>& pack) {
  if (vector && column + kCount <= columns) {
    store_pack(row + column, pack);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
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

// word_at of rmm_common.h without an array that is indexed at run time.
__device__ __forceinline__ uint32_t one_word(uint64_t key, uint64_t index) {
  const keyed::Block block = keyed::words(key, index / 4);
  const uint32_t low = index & 1 ? block.word[1] : block.word[0], high = index & 1 ? block.word[3] : block.word[2];
  return index & 2 ? high : low;
}

// kChunk columns of S, the first one a multiple of kChunk; columns from `projected` on are 0. What depends on block and
// column only is kept between calls.
template <int kSketch, typename T>
struct UnitElements {
  uint32_t frequency[kSketch == kSrht ? kChunk : 1];

  __device__ __forceinline__ void begin(const Segment& segment, int64_t block, int64_t column) {
    if constexpr (kSketch == kSrht) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        const bool exists = column + e < segment.projected;
        const int64_t place = block * segment.projected + (exists ? column + e : 0);
        frequency[e] = static_cast<uint32_t>(__ldg(segment.chosen + place));
      }
    }
  }

  // Row q of the segment, which is row l of its block.
  __device__ __forceinline__ void make(const Segment& segment, int64_t q, int64_t l, int64_t column,
                                       T (&made)[kChunk]) const {
    [[maybe_unused]] const uint64_t row = static_cast<uint64_t>(q);
    [[maybe_unused]] const uint64_t global = static_cast<uint64_t>(segment.base_row) + row;
    if constexpr (kSketch == kGaussian) {
      normals(segment, segment.before + row * static_cast<uint64_t>(segment.projected) + column, made);
    } else if constexpr (kSketch == kRademacher) {
      const uint64_t first = segment.before + row * static_cast<uint64_t>(sign_words(segment.projected));
      const uint32_t word = one_word(segment.key, first + column / 32) >> (column & 31);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) made[e] = signed_one((word >> e) & 1u, T{});
    } else if constexpr (kSketch == kSrht) {
      const bool sign = negative_bit(one_word(segment.key, global / 32), global & 31);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        made[e] = signed_one(sign != hadamard_negative(l, frequency[e]), T{});
      }
    } else if constexpr (kSketch == kCount) {
      const uint32_t word = one_word(segment.key, global);
      const int64_t place = count_column(word, segment.projected) - column;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) made[e] = place == e ? signed_one(count_negative(word), T{}) : T{};
    } else {
      const T* const source = static_cast<const T*>(segment.matrix) + q * segment.projected;
#pragma unroll
      for (int e = 0; e < kChunk; ++e) made[e] = column + e < segment.projected ? load_one(source + column + e) : T{};
    }
    if (column + kChunk > segment.projected) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) made[e] = column + e < segment.projected ? made[e] : T{};
    }
  }

 private:
  __device__ __forceinline__ static void normals(const Segment& segment, uint64_t first, T (&made)[kChunk]) {
    uint32_t word[kChunk];
    if (first % 4 == 0) {
#pragma unroll
      for (int half = 0; half < kChunk / 4; ++half) {
        const keyed::Block block = keyed::words(segment.key, first / 4 + half);
#pragma unroll
        for (int e = 0; e < 4; ++e) word[4 * half + e] = block.word[e];
      }
    } else {  // only where p is no multiple of 4: blocks of a few rows
#pragma unroll
      for (int e = 0; e < kChunk; ++e) word[e] = one_word(segment.key, first + e);
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) made[e] = round_to<T>(keyed::normal_from_word(word[e]));
  }
};

// ---- entry points, one file each; `out` is contiguous, (blocks * projected, features) ------------------------------

// rmm_tensor.cu: S^T X for bfloat16 and float16, sketch gaussian, rademacher, srht or kGiven.
cudaError_t tensor_sketch(int sketch, const Rows& x, const Segment& segment, float scale, void* out, int dtype,
                          int device, cudaStream_t stream);
// rmm_float.cu: the same for float32.
cudaError_t float_sketch(int sketch, const Rows& x, const Segment& segment, float scale, void* out,
                         cudaStream_t stream);
// rmm_gather.cu: count sketch and rows.
cudaError_t count_sketch(const Rows& x, const Segment& segment, float scale, void* out, int dtype,
                         cudaStream_t stream);
cudaError_t row_sketch(const Rows& x, const Segment& segment, float scale, void* out, int dtype, cudaStream_t stream);

}  // namespace rmm
}  // namespace ds_efficient
