// The grouped rank-1 update on CUDA devices; see mkor_common.h. No torch headers.
//
// M is symmetric, so tiles of its lower triangle suffice for M v, and for the update, which writes each new tile twice,
// the second time transposed. Memory traffic of a matrix that does not fit in the L2 cache: d^2 / 2 elements read for
// M v, d^2 / 2 read and d^2 written for the update: as much as reading and writing M once. (M v needs all of M before
// the update can begin, hence two passes.) The update goes through the tiles in reverse order, so that it finds the
// last ones of the first pass in the cache.
//
// Blocks of a launch share the tiles of all factors. For few tiles, where the time between launches counts, and for few
// parts (d up to 1024), the update adds up the parts of M v by itself, each block those of its rows and columns, and
// q comes from the tiles; beyond that a launch between the two does it once.
//
// Where the device can, a kernel begins while the one before is ending (launch.h). products_kernel waits for all before
// it and only then lets the next begin. So before their waits sums_kernel and update_kernel run beside kernels of the
// same update only, and may read what none of these writes by then: M and v. Scratch memory is touched after the waits.
#include <cuda_runtime.h>
#include <device_atomic_functions.h>

#include <algorithm>
#include <cstring>

#include "launch.h"
#include "mkor_common.h"
#include "mkor_cuda.h"

namespace ds_efficient {
namespace mkor {
namespace {

using launches::launch_after;
constexpr int kResident = 4;  // blocks of a multiprocessor at a time: at most 64 registers a thread
constexpr int kFewBlocks = 8, kFewTiles = 1056;  // beyond both, adding up in every block costs more than a launch
constexpr int kMost = 96;  // factors of a launch: the table is an argument, of which 4 KiB are allowed

struct Factor {
  void* matrix;
  int64_t vector;   // of the vectors: elements before those of this factor
  int64_t partial;  // of the scratch memory: elements before those of this factor
  int32_t size, blocks;             // d, and tiles of a row
  int32_t first_tile, first_block;  // of the tiles and of the rows of tiles of the launch
};

struct Group {
  Factor factor[kMost];
  int32_t count;
};

// Arrays of the launch; `largest`, `outcome` and `before` have an element a factor.
struct State {
  const float* vectors;
  float* largest;
  int32_t* outcome;
  float* partial;  // of each factor (blocks, blocks * kTile): what a column of tiles adds to M v
  float* u;        // kTile elements a row of tiles
  double* q;       // what a tile, or a row of tiles, adds to v^T M v, M as stored, and to v^T v
  float* before;   // largest, as it was
};

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

template <typename T>
__device__ __forceinline__ bool is_aligned(const Factor& factor) {
  return factor.size % Share<T>::kVector == 0 && reinterpret_cast<uintptr_t>(factor.matrix) % 16 == 0;
}

// An element of M v, M as stored: its parts have a fixed order.
__device__ __forceinline__ double product_of(const Factor& factor, const State& state, int row) {
  const float* const partial = state.partial + factor.partial + row;
  const int64_t padded = static_cast<int64_t>(factor.blocks) * kTile;
  double product = 0.0;
#pragma unroll 8
  for (int b = 0; b < factor.blocks; ++b) product += static_cast<double>(partial[b * padded]);
  return product;
}

// ---- pass 1: M v ---------------------------------------------------------------------------------------------------

// A block multiplies a tile with the part of v for its columns, and its transpose with that for its rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    products_kernel(const Group group, const State state, bool fused) {
  using S = Share<T>;
  constexpr int kAhead = sizeof(T) == 4 ? 8 : 4;  // steps whose loads are on their way together
  __shared__ float row_v[kTile], column_v[kTile], column_sum[S::kRows][kTile];
  __shared__ double part[S::kRows][2];
  launches::wait_for_previous();
  launches::let_next_begin();  // not before the wait: the next kernels read M and v before theirs
  const int index = factor_of(group, static_cast<int>(blockIdx.x), &Factor::first_tile);
  const Factor& factor = group.factor[index];
  const int tile = static_cast<int>(blockIdx.x) - factor.first_tile, size = factor.size;
  int tile_row, tile_column;
  place_of(tile, &tile_row, &tile_column);
  const int first_row = tile_row * kTile, first_column = tile_column * kTile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % S::kLanes, mine = thread / S::kLanes;
  if (tile == 0 && thread == 0) {
    state.before[index] = state.largest[index];
    if (fused) state.largest[index] = 0.0f;  // the update finds the new one
  }
  {
    const int local = thread % kTile, place = (thread < kTile ? first_row : first_column) + local;
    const float value = place < size ? state.vectors[factor.vector + place] : 0.0f;
    if (thread < kTile) row_v[local] = value; else column_v[local] = value;
  }
  __syncthreads();
  const T* const matrix = static_cast<const T*>(factor.matrix);
  const bool vector = is_aligned<T>(factor), last = lane == S::kLanes - 1;
  float* const partial = state.partial + factor.partial;
  const int64_t padded = static_cast<int64_t>(factor.blocks) * kTile;
  float columns[S::kVector] = {}, v[S::kVector];
  double q = 0.0, square = 0.0;
#pragma unroll
  for (int e = 0; e < S::kVector; ++e) v[e] = column_v[S::kVector * lane + e];
#pragma unroll 1
  for (int first = 0; first < kTile; first += kAhead * S::kRows) {
    uint4 bits[kAhead];  // loaded before any result is stored, since the compiler cannot know that they do not overlap
    load_rows<T>(matrix, first_row + first + mine, first_column + S::kVector * lane, size, vector, bits);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int row = first + r * S::kRows + mine;
      float x[S::kVector], dot = 0.0f;
      unpack<T>(bits[r], x);
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) {
        dot = keyed::fma_rn(x[e], v[e], dot);
        columns[e] = keyed::fma_rn(x[e], row_v[row], columns[e]);
      }
      dot = lane_sum<S::kLanes>(dot);
      if (last) {
        partial[tile_column * padded + first_row + row] = dot;
        const double here = static_cast<double>(row_v[row]);
        q += static_cast<double>(dot) * here;
        square += here * here;
      }
    }
  }
  const bool diagonal = tile_row == tile_column;
  if (last) {
    part[mine][0] = q;
    part[mine][1] = square;
  }
#pragma unroll
  for (int e = 0; e < S::kVector; ++e) column_sum[mine][S::kVector * lane + e] = columns[e];
  __syncthreads();
  if (fused && thread < 2) {  // a tile beside the diagonal counts for its mirror too, and v once
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < S::kRows; ++w) sum += part[w][thread];
    const double weight = thread == 0 ? (diagonal ? 1.0 : 2.0) : (diagonal ? 1.0 : 0.0);
    state.q[2 * static_cast<int64_t>(blockIdx.x) + thread] = weight == 0.0 ? 0.0 : weight * sum;
  }
  if (!diagonal && thread < kTile) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kRows; ++w) sum += column_sum[w][thread];
    partial[tile_row * padded + first_column + thread] = sum;
  }
}

// A block adds up kTile elements of u and what they contribute to q.
__global__ void __launch_bounds__(kTile) sums_kernel(const Group group, const State state, const Rule rule) {
  __shared__ double part[2][kTile];
  launches::let_next_begin();
  const int index = factor_of(group, static_cast<int>(blockIdx.x), &Factor::first_block);
  const Factor& factor = group.factor[index];
  const int block = static_cast<int>(blockIdx.x) - factor.first_block, thread = static_cast<int>(threadIdx.x);
  const int row = block * kTile + thread;
  const float v = row < factor.size ? fetch<true>(state.vectors + factor.vector + row) : 0.0f;
  launches::wait_for_previous();
  const double product = product_of(factor, state, row);
  const float u = blended_product(rule, blends(rule, state.before[index]), product, v);
  state.u[static_cast<int64_t>(blockIdx.x) * kTile + thread] = u;
  part[0][thread] = product * static_cast<double>(v);
  part[1][thread] = static_cast<double>(v) * static_cast<double>(v);
  for (int half = kTile / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      part[0][thread] += part[0][thread + half];
      part[1][thread] += part[1][thread + half];
    }
  }
  if (thread == 0) {
    state.q[2 * static_cast<int64_t>(blockIdx.x)] = part[0][0];
    state.q[2 * static_cast<int64_t>(blockIdx.x) + 1] = part[1][0];
    if (block == 0) state.largest[index] = 0.0f;  // the update finds the new one
  }
}

// ---- pass 2: the update --------------------------------------------------------------------------------------------

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

// Raises `largest` to the largest number of the threads of the block, none negative.
__device__ __forceinline__ void raise(float* largest, float mine) {
  __shared__ float warp_most[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t bits = static_cast<uint32_t>(keyed::bits_of(mine));
    mine = fmaxf(mine, keyed::float_of(static_cast<int32_t>(__shfl_up_sync(0xffffffffu, bits, step))));
  }
  if (lane == 31) warp_most[thread / 32] = mine;
  __syncthreads();
  if (thread == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) mine = fmaxf(mine, warp_most[w]);
    atomicMax(reinterpret_cast<int*>(largest), keyed::bits_of(mine));  // such numbers order as their bits do
  }
}

// A block updates a tile, strip by strip, and writes it to both sides of the diagonal.
template <typename T, bool kAdds>
__global__ void __launch_bounds__(kThreads, kResident)
    update_kernel(const Group group, const State state, const Rule rule) {
  using S = Share<T>;
  constexpr int kSteps = 4, kStrip = kSteps * S::kRows, kWords = kTile * static_cast<int>(sizeof(T)) / 4 + 1;
  __shared__ float w[2 * kTile];
  __shared__ uint32_t strip[kStrip * kWords];
  const int reversed = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int index = factor_of(group, reversed, &Factor::first_tile);
  const Factor& factor = group.factor[index];
  const int tile = reversed - factor.first_tile, size = factor.size;
  int tile_row, tile_column;
  place_of(tile, &tile_row, &tile_column);
  const int first_row = tile_row * kTile, first_column = tile_column * kTile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % S::kLanes, mine = thread / S::kLanes;
  T* const matrix = static_cast<T*>(factor.matrix);
  const bool vector = is_aligned<T>(factor);
  uint4 bits[kSteps];
  load_rows<T, true>(matrix, first_row + mine, first_column + S::kVector * lane, size, vector, bits);
  const int base = (thread < kTile ? first_row : first_column) + thread % kTile;
  launches::wait_for_previous();
  const float before = state.before[index];
  double u;
  if (kAdds) {
    const float v = base < size ? state.vectors[factor.vector + base] : 0.0f;
    const double product = product_of(factor, state, base);
    u = blends(rule, before) ? rule.zeta * product + (1.0 - rule.zeta) * static_cast<double>(v) : product;
  } else {
    u = static_cast<double>(state.u[static_cast<int64_t>(factor.first_block) * kTile + base]);
  }
  const double* const q = state.q + 2 * static_cast<int64_t>(kAdds ? factor.first_tile : factor.first_block);
  const Step step = decide_in_block(q, kAdds ? tiles_of(factor) : factor.blocks, before, rule, limits_of<T>());
  if (tile == 0 && thread == 0) {
    state.outcome[index] = step.outcome;
    if (step.outcome == kLeft) state.largest[index] = before;
  }
  if (step.outcome == kLeft) return;
  w[thread] = step.factor == 0.0 ? 0.0f : static_cast<float>(step.factor * u);
  __syncthreads();
  float most = 0.0f;
  for (int first = 0; first < kTile; first += kStrip) {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      const int local = r * S::kRows + mine, row = first_row + first + local, column = first_column + S::kVector * lane;
      float x[S::kVector];
      T made[S::kVector];
      unpack<T>(bits[r], x);
#pragma unroll
      for (int e = 0; e < S::kVector; ++e) {
        const float shift = row == column + e ? step.shift : 0.0f;
        made[e] = round_to<T>(
            updated(x[e], step.scale, shift, w[first + local], w[kTile + S::kVector * lane + e]));
        if (row < size && column + e < size) most = fmaxf(most, fabsf(to_float(made[e])));
      }
      uint4 done;
      memcpy(&done, made, sizeof done);
      uint32_t* const to = strip + local * kWords + 4 * lane;
      to[0] = done.x;
      to[1] = done.y;
      to[2] = done.z;
      to[3] = done.w;
      store_row<T>(matrix, row, column, size, vector, done);
    }
    if (first + kStrip < kTile) {
      load_rows<T>(matrix, first_row + first + kStrip + mine, first_column + S::kVector * lane, size, vector, bits);
    }
    if (tile_row == tile_column) continue;
    __syncthreads();  // below the diagonal every column is inside of the matrix
    store_mirrored(matrix, first_row + first, first_column, size, vector, strip, kWords, thread % 32, thread / 32);
    __syncthreads();
  }
  raise(state.largest + index, most);
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t run_group(const Group& group, int tiles, int blocks, const State& state, const Rule& rule, int most_fused,
                      int device, cudaStream_t stream) {
  int32_t most = 0;
  for (int i = 0; i < group.count; ++i) most = std::max(most, group.factor[i].blocks);
  const bool fused = most <= most_fused && (most <= kFewBlocks || tiles <= kFewTiles);
  cudaError_t error = launch_after<products_kernel<T>>(tiles, kThreads, device, stream, group, state, fused);
  if (error != cudaSuccess) return error;
  if (fused) return launch_after<update_kernel<T, true>>(tiles, kThreads, device, stream, group, state, rule);
  error = launch_after<sums_kernel>(blocks, kTile, device, stream, group, state, rule);
  return error ? error : launch_after<update_kernel<T, false>>(tiles, kThreads, device, stream, group, state, rule);
}

}  // namespace
}  // namespace mkor
}  // namespace ds_efficient

extern "C" {

using namespace ds_efficient;

int ds_efficient_mkor_version() { return DS_EFFICIENT_MKOR_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Update `count` factors in place. matrices, sizes: of each factor the address and d, in host memory; vectors: all v
// one behind the other. Scratch memory on the device, with b = ceil(d / 128) of each factor of a launch: partial
// 128 b^2 floats, u 128 b floats, q b (b + 1) doubles; and before, a float for each of all factors.
// most_fused: rows of tiles up to which two launches may do. Returns a cudaError_t.
int ds_efficient_mkor_update(void* const* matrices, const int64_t* sizes, int64_t count, const float* vectors,
                             float* largest, int32_t* outcome, double gamma, double threshold, double zeta,
                             float* partial, float* u, double* q, float* before, int most_fused, int dtype,
                             int device, cudaStream_t stream) {
  cudaError_t error = cudaSetDevice(device);
  if (dtype < mkor::kFloat32 || dtype > mkor::kFloat16) return cudaErrorInvalidValue;
  const mkor::Rule rule{gamma, threshold, zeta};
  for (int64_t first = 0; first < count && error == cudaSuccess; first += mkor::kMost) {
    mkor::Group group;
    memset(&group, 0, sizeof group);
    group.count = static_cast<int32_t>(std::min<int64_t>(mkor::kMost, count - first));
    int64_t tiles = 0, rows = 0, vector = 0, used = 0;
    for (int i = 0; i < group.count; ++i) {
      const int64_t size = sizes[first + i], blocks = (size + mkor::kTile - 1) / mkor::kTile;
      group.factor[i] = mkor::Factor{matrices[first + i], vector, used, static_cast<int32_t>(size),
                                     static_cast<int32_t>(blocks), static_cast<int32_t>(tiles),
                                     static_cast<int32_t>(rows)};
      tiles += blocks * (blocks + 1) / 2;
      rows += blocks;
      vector += size;
      used += blocks * blocks * mkor::kTile;
    }
    if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
    const mkor::State state{vectors, largest + first, outcome + first, partial, u, q, before + first};
    const auto run = dtype == mkor::kFloat32    ? mkor::run_group<float>
                     : dtype == mkor::kBfloat16 ? mkor::run_group<mkor::Bfloat16>
                                                : mkor::run_group<mkor::Float16>;
    error = run(group, static_cast<int>(tiles), static_cast<int>(rows), state, rule, most_fused, device, stream);
    vectors += vector;  // later groups use the same scratch memory again: launches of a stream follow each other
  }
  return error;
}

}  // extern "C"
