// What the CUDA kernels of MKOR share: rows of a tile in steps of 16 bytes a thread, sums of a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "mkor_common.h"

namespace ds_efficient {
namespace mkor {

constexpr int kTile = 128, kThreads = 256, kWarps = kThreads / 32;

// How the threads of a block share rows of a tile: a thread has kVector elements, side by side, of a row in each step.
template <typename T>
struct Share {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kLanes = kTile / kVector;    // threads of a row
  static constexpr int kSubs = 32 / kLanes;         // rows of a warp
  static constexpr int kRows = kWarps * kSubs;      // rows of a block
};

template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&x)[Share<T>::kVector]) {
  T value[Share<T>::kVector];
  memcpy(value, &bits, sizeof bits);
#pragma unroll
  for (int e = 0; e < Share<T>::kVector; ++e) x[e] = to_float(value[e]);
}

// A value in global memory; with kFromL2 not from the cache of the multiprocessor, see rule 3 in launch.h.
template <bool kFromL2, typename T>
__device__ __forceinline__ T fetch(const T* from) {
  if constexpr (!kFromL2) {
    return *from;
  } else if constexpr (sizeof(T) == sizeof(unsigned short)) {
    const unsigned short bits = __ldcg(reinterpret_cast<const unsigned short*>(from));
    T value;
    memcpy(&value, &bits, sizeof bits);
    return value;
  } else {
    return __ldcg(from);
  }
}

// Elements column .. column + kVector - 1 of the rows row, row + kRows, ... of a matrix; those outside of it are 0. One
// branch for all rows, and no use of a number before the last load is on its way.
template <typename T, bool kFromL2 = false, int kSteps>
__device__ __forceinline__ void load_rows(const T* matrix, int row, int column, int size, bool vector,
                                          uint4 (&bits)[kSteps]) {
  constexpr int kVector = Share<T>::kVector;
  const T* const from = matrix + static_cast<int64_t>(row) * size + column;
  const int64_t stride = static_cast<int64_t>(Share<T>::kRows) * size;
  if (vector) {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      bits[r] = uint4{};
      if (row + r * Share<T>::kRows < size && column < size) {
        bits[r] = fetch<kFromL2>(reinterpret_cast<const uint4*>(from + r * stride));
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      T value[kVector];
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const bool inside = row + r * Share<T>::kRows < size && column + e < size;
        value[e] = inside ? fetch<kFromL2>(from + r * stride + e) : T{};
      }
      memcpy(&bits[r], value, sizeof value);
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_row(T* matrix, int row, int column, int size, bool vector, const uint4& bits) {
  T* const to = matrix + static_cast<int64_t>(row) * size + column;
  if (vector && row < size && column < size) {
    *reinterpret_cast<uint4*>(to) = bits;
  } else {
    T value[Share<T>::kVector];
    memcpy(value, &bits, sizeof bits);
#pragma unroll
    for (int e = 0; e < Share<T>::kVector; ++e) {
      if (row < size && column + e < size) to[e] = value[e];
    }
  }
}

// Writes a strip, rows of a tile, to the other side of the diagonal: row, column are the place of its first element. It
// lies in shared memory as rows of `words` words of four bytes, in each a float32 or two half elements.
__device__ __forceinline__ void store_mirrored(float* matrix, int row, int column, int size, bool,
                                               const uint32_t* strip, int words, int lane, int warp) {
  if (row + lane >= size) return;
#pragma unroll 4
  for (int c = warp; c < kTile; c += kWarps) {
    matrix[static_cast<int64_t>(column + c) * size + row + lane] =
        keyed::float_of(static_cast<int32_t>(strip[lane * words + c]));
  }
}

template <typename T>
__device__ __forceinline__ void store_mirrored(T* matrix, int row, int column, int size, bool vector,
                                               const uint32_t* strip, int words, int lane, int warp) {
  const int mine = row + 2 * lane;
  if (mine >= size) return;
#pragma unroll 4
  for (int pair = warp; pair < kTile / 2; pair += kWarps) {
    const uint32_t upper = strip[2 * lane * words + pair], lower = strip[(2 * lane + 1) * words + pair];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      T* const to = matrix + static_cast<int64_t>(column + 2 * pair + odd) * size + mine;
      const uint32_t first = odd ? upper >> 16 : upper & 0xffffu, second = odd ? lower >> 16 : lower & 0xffffu;
      if (vector) {  // then sizes are multiples of 8
        *reinterpret_cast<uint32_t*>(to) = first | second << 16;
      } else {
        to[0] = T{static_cast<uint16_t>(first)};
        if (mine + 1 < size) to[1] = T{static_cast<uint16_t>(second)};
      }
    }
  }
}

// The sum over kLanes threads side by side, in the last of them only.
template <int kLanes>
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t mine = static_cast<uint32_t>(keyed::bits_of(value));
    value += keyed::float_of(static_cast<int32_t>(__shfl_up_sync(0xffffffffu, mine, step)));
  }
  return value;
}

}  // namespace mkor
}  // namespace ds_efficient
