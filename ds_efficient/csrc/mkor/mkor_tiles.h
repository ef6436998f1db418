// What the kernels of the rank-1 update share: the table of a launch, what a block does with a tile in each of the two
// passes, and what it decides in between.
#pragma once

#include <cuda_runtime.h>
#include <device_atomic_functions.h>

#include "mkor_common.h"
#include "mkor_cuda.h"

namespace ds_efficient {
namespace mkor {

constexpr int kResident = 4;  // blocks of a multiprocessor at a time: at most 64 registers a thread
constexpr int kMost = 96;     // factors of a launch: the table is an argument, of which 4 KiB are allowed

struct Factor {
  void* matrix;
  int32_t vector;                   // of the vectors: elements before those of this factor
  int32_t partial;                  // of the scratch memory: rows of kTile elements before those of this factor
  int32_t size, blocks;             // d, and tiles of a row
  int32_t first_tile, first_block;  // of the tiles and of the rows of tiles of the launch
  int32_t place;                    // among all factors of the call
};

struct Group {
  Factor factor[kMost];
  int32_t count;
};

// Arrays of the call; `largest`, `outcome` and `before` have an element a factor.
struct State {
  const float* vectors;
  float* largest;
  int32_t* outcome;
  float* partial;  // of each factor of the launch (blocks, blocks * kTile): what a column of tiles adds to M v
  float* u;        // kTile elements a row of tiles
  double* q;       // what a tile, or a row of tiles, adds to v^T M v, M as stored, and to v^T v
  float* before;   // largest, as it was
};

// In mkor_resident.cu. The tiles that one launch of run_resident may have, 0 where the device has no such launches.
int resident_tiles(int dtype, int device);
cudaError_t run_resident(const Group& group, int tiles, const State& state, const Rule& rule, int dtype,
                         cudaStream_t stream);

__device__ __forceinline__ int tiles_of(const Factor& factor) { return factor.blocks * (factor.blocks + 1) / 2; }

__device__ __forceinline__ int factor_of(const Group& group, int place, int32_t Factor::*first) {
  int low = 0, high = group.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.factor[middle].*first <= place) low = middle; else high = middle;
  }
  return low;
}

// Row and column of the tile of a lower triangle, counted row by row.
__device__ __forceinline__ void place_of(int tile, int* row, int* column) {
  int found = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
  while (found * (found + 1) / 2 > tile) --found;
  while ((found + 1) * (found + 2) / 2 <= tile) ++found;
  *row = found;
  *column = tile - found * (found + 1) / 2;
}

// A tile as a thread sees it.
template <typename T>
struct Tile {
  const Factor& factor;
  T* matrix;
  int first_row, first_column;
  bool first, diagonal, vector;  // vector: rows may be read and written 16 bytes at a time
  int thread, lane, mine;        // lane of a row, and the row of those that the block takes together

  __device__ __forceinline__ Tile(const Factor& its, int tile)
      : factor(its), matrix(static_cast<T*>(its.matrix)), first(tile == 0), thread(static_cast<int>(threadIdx.x)) {
    using S = Share<T>;
    int row, column;
    place_of(tile, &row, &column);
    first_row = row * kTile;
    first_column = column * kTile;
    diagonal = row == column;
    vector = its.size % S::kVector == 0 && reinterpret_cast<uintptr_t>(its.matrix) % 16 == 0;
    lane = thread % S::kLanes;
    mine = thread / S::kLanes;
  }
  // Row or column of the matrix that is this thread's in vectors of 2 kTile elements: the tile's rows, then columns.
  __device__ __forceinline__ int border() const {
    return (thread < kTile ? first_row : first_column) + thread % kTile;
  }
  // This thread's column of the matrix, the first of kVector.
  __device__ __forceinline__ int column() const { return first_column + Share<T>::kVector * lane; }
  template <int kSteps>
  __device__ __forceinline__ void load(int row, uint4 (&bits)[kSteps]) const {
    load_rows<T>(matrix, first_row + row + mine, column(), factor.size, vector, bits);
  }
};

// An element of M v, M as stored: its parts have a fixed order.
__device__ __forceinline__ double product_of(const Factor& factor, const State& state, int row) {
  const float* const partial = state.partial + static_cast<int64_t>(factor.partial) * kTile + row;
  const int64_t padded = static_cast<int64_t>(factor.blocks) * kTile;
  double product = 0.0;
#pragma unroll 8
  for (int b = 0; b < factor.blocks; ++b) product += static_cast<double>(partial[b * padded]);
  return product;
}

// ---- pass 1: M v ---------------------------------------------------------------------------------------------------

// The sums of a thread over the rows of a tile.
template <typename T>
struct Products {
  float v[Share<T>::kVector];             // for its columns
  float columns[Share<T>::kVector] = {};  // of its rows, each times v's element for the row
  double q = 0.0, square = 0.0;           // in the last lane of a row only

  // v's elements for the tile's rows and columns, into `both`; all threads of the block.
  __device__ __forceinline__ Products(const Tile<T>& tile, const State& state, float (&both)[2 * kTile]) {
    const int place = tile.border();
    both[tile.thread] = place < tile.factor.size ? state.vectors[tile.factor.vector + place] : 0.0f;
    __syncthreads();
#pragma unroll
    for (int e = 0; e < Share<T>::kVector; ++e) v[e] = both[kTile + Share<T>::kVector * tile.lane + e];
  }

  // Rows of a tile from row `first` on, already loaded.
  template <int kSteps>
  __device__ __forceinline__ void add(const Tile<T>& tile, const State& state, const uint4 (&bits)[kSteps], int first,
                                      const float (&row_v)[2 * kTile]) {
    using S = Share<T>;
    float* const partial = state.partial + static_cast<int64_t>(tile.factor.partial) * kTile;
    const int64_t padded = static_cast<int64_t>(tile.factor.blocks) * kTile;
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      const int row = first + r * S::kRows + tile.mine;
      float x[S::kVector], dot = 0.0f;
      unpack<T>(bits[r], x);
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) {
        dot = keyed::fma_rn(x[e], v[e], dot);
        columns[e] = keyed::fma_rn(x[e], row_v[row], columns[e]);
      }
      dot = lane_sum<S::kLanes>(dot);
      if (tile.lane == S::kLanes - 1) {
        partial[tile.first_column / kTile * padded + tile.first_row + row] = dot;
        const double here = static_cast<double>(row_v[row]);
        q += static_cast<double>(dot) * here;
        square += here * here;
      }
    }
  }

  // Adds up over the block and hands over what the tile contributes; `column_sum` is of shared memory.
  __device__ __forceinline__ void finish(const Tile<T>& tile, const State& state, float (*column_sum)[kTile],
                                         bool with_q) {
    using S = Share<T>;
    __shared__ double part[S::kRows][2];
    if (tile.lane == S::kLanes - 1) {
      part[tile.mine][0] = q;
      part[tile.mine][1] = square;
    }
#pragma unroll
    for (int e = 0; e < S::kVector; ++e) column_sum[tile.mine][S::kVector * tile.lane + e] = columns[e];
    __syncthreads();
    const int thread = tile.thread;
    if (with_q && thread < 2) {  // a tile beside the diagonal counts for its mirror too, and v once
      double sum = 0.0;
#pragma unroll
      for (int w = 0; w < S::kRows; ++w) sum += part[w][thread];
      const double weight = thread == 0 ? (tile.diagonal ? 1.0 : 2.0) : (tile.diagonal ? 1.0 : 0.0);
      state.q[2 * static_cast<int64_t>(blockIdx.x) + thread] = weight == 0.0 ? 0.0 : weight * sum;
    }
    if (!tile.diagonal && thread < kTile) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < S::kRows; ++w) sum += column_sum[w][thread];
      const int64_t padded = static_cast<int64_t>(tile.factor.blocks) * kTile;
      state.partial[static_cast<int64_t>(tile.factor.partial) * kTile + tile.first_row / kTile * padded +
                    tile.first_column + thread] = sum;
    }
  }
};

// ---- pass 2: the update --------------------------------------------------------------------------------------------

// An element of u where no launch between the passes has added up the parts of M v.
__device__ __forceinline__ double sum_of_parts(const Factor& factor, const State& state, const Rule& rule, bool blend,
                                               int row) {
  const float v = row < factor.size ? state.vectors[factor.vector + row] : 0.0f;
  const double product = product_of(factor, state, row);
  return blend ? rule.zeta * product + (1.0 - rule.zeta) * static_cast<double>(v) : product;
}

// What is done to the factor, from `count` parts of q. Every block of a factor comes to the same decision.
__device__ __forceinline__ Step decide_in_block(const double* q, int count, float before, const Rule& rule,
                                                const Limits& limits) {
  __shared__ double part[2][kThreads];
  __shared__ Step step;
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0.0, square = 0.0;
  for (int i = thread; i < count; i += kThreads) {
    sum += q[2 * i];
    square += q[2 * i + 1];
  }
  part[0][thread] = sum;
  part[1][thread] = square;
  __syncthreads();
  if (thread < 32) {
    for (int i = thread + 32; i < kThreads; i += 32) {
      part[0][thread] += part[0][i];
      part[1][thread] += part[1][i];
    }
  }
  __syncthreads();
  if (thread == 0) {
    sum = square = 0.0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      sum += part[0][i];
      square += part[1][i];
    }
    if (blends(rule, before)) sum = rule.zeta * sum + (1.0 - rule.zeta) * square;
    step = decide(rule, limits, before, sum, square);
  }
  __syncthreads();
  return step;
}

// The part of a tile's rows that is mirrored at a time, in shared memory.
template <typename T>
struct Strip {
  static constexpr int kSteps = 4, kRows = kSteps * Share<T>::kRows;
  static constexpr int kWords = kTile * static_cast<int>(sizeof(T)) / 4 + 1;  // of a row, one to spare
  static constexpr int kAll = kRows * kWords;
};

// What a block does in the second pass.
template <typename T>
struct Update {
  const Tile<T>& tile;
  const Step step;
  const float (&w)[2 * kTile];  // for the tile's rows and columns
  uint32_t* const strip;
  float most = 0.0f;

  // New rows of the tile from row `first` on, written there and into the strip.
  __device__ __forceinline__ void write(const uint4 (&bits)[Strip<T>::kSteps], int first) {
    using S = Share<T>;
    const int size = tile.factor.size, column = tile.column();
#pragma unroll
    for (int r = 0; r < Strip<T>::kSteps; ++r) {
      const int local = r * S::kRows + tile.mine, row = tile.first_row + first + local;
      float x[S::kVector];
      T made[S::kVector];
      unpack<T>(bits[r], x);
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) {
        const float shift = row == column + e ? step.shift : 0.0f;
        made[e] = round_to<T>(
            updated(x[e], step.scale, shift, w[first + local], w[kTile + S::kVector * tile.lane + e]));
        if (row < size && column + e < size) most = fmaxf(most, fabsf(to_float(made[e])));
      }
      uint4 done;
      memcpy(&done, made, sizeof done);
      uint32_t* const to = strip + local * Strip<T>::kWords + 4 * tile.lane;
      to[0] = done.x;
      to[1] = done.y;
      to[2] = done.z;
      to[3] = done.w;
      store_row<T>(tile.matrix, row, column, size, tile.vector, done);
    }
  }

  // The strip, rows from `first` on, to the other side of the diagonal; all threads of the block.
  __device__ __forceinline__ void mirror(int first) const {
    if (tile.diagonal) return;
    __syncthreads();  // below the diagonal every column is inside of the matrix
    store_mirrored(tile.matrix, tile.first_row + first, tile.first_column, tile.factor.size, tile.vector, strip,
                   Strip<T>::kWords, tile.thread % 32, tile.thread / 32);
    __syncthreads();
  }

  // Raises `largest` to the largest entry that the block has written, none negative.
  __device__ __forceinline__ void raise(float* largest) {
    __shared__ float warp_most[kWarps];
    const int thread = tile.thread;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t bits = static_cast<uint32_t>(keyed::bits_of(most));
      most = fmaxf(most, keyed::float_of(static_cast<int32_t>(__shfl_up_sync(0xffffffffu, bits, step))));
    }
    if (thread % 32 == 31) warp_most[thread / 32] = most;
    __syncthreads();
    if (thread == 0) {
#pragma unroll
      for (int each = 0; each < kWarps; ++each) most = fmaxf(most, warp_most[each]);
      atomicMax(reinterpret_cast<int*>(largest), keyed::bits_of(most));  // such numbers order as their bits do
    }
  }
};

}  // namespace mkor
}  // namespace ds_efficient
