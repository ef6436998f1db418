// The grouped rank-1 update on CUDA devices; see mkor_common.h. No torch headers.
//
// M is symmetric, so tiles of its lower triangle suffice for M v, and for the update, which writes each new tile twice,
// the second time transposed. Memory traffic of a matrix that does not fit in the L2 cache: d^2 / 2 elements read for
// M v, d^2 / 2 read and d^2 written for the update: as much as reading and writing M once. (M v needs all of M before
// the update can begin, hence two passes.) The update goes through the tiles in reverse order, so that it finds the
// last ones of the first pass in the cache. Blocks of three launches share the tiles of all factors.
#include <cuda_runtime.h>
#include <device_atomic_functions.h>

#include <algorithm>
#include <cstring>

#include "mkor_common.h"

namespace ds_efficient {
namespace mkor {
namespace {

constexpr int kTile = 128, kThreads = 256, kWarps = kThreads / 32, kStrip = 32;
constexpr int kRowsPerWarp = kTile / kWarps, kStripRows = kStrip / kWarps;
constexpr int kAhead = 8;  // rows that a warp loads at a time
constexpr int kResident = 4;  // blocks of a multiprocessor at a time: at most 64 registers a thread
constexpr int kMost = 96;  // factors of a launch: the table is an argument, of which 4 KiB are allowed

static_assert(kTile == 4 * 32, "a lane has four columns of a tile");

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
  double* q;       // one a row of tiles
  float* before;   // largest, as it was
};

__device__ __forceinline__ int factor_of_tile(const Group& group, int tile) {
  int low = 0, high = group.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.factor[middle].first_tile <= tile) low = middle; else high = middle;
  }
  return low;
}

__device__ __forceinline__ int factor_of_block(const Group& group, int block) {
  int low = 0, high = group.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (group.factor[middle].first_block <= block) low = middle; else high = middle;
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

// The sum over the warp, in lane 31 only.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t mine = static_cast<uint32_t>(keyed::bits_of(value));
    value += keyed::float_of(static_cast<int32_t>(__shfl_up_sync(0xffffffffu, mine, step)));
  }
  return value;
}

// ---- four elements of a row ----------------------------------------------------------------------------------------

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using Type = uint4;
};
template <>
struct Bits<Bfloat16> {
  using Type = uint2;
};

template <typename T>
__device__ __forceinline__ bool is_aligned(const Factor& factor) {
  return factor.size % 4 == 0 && reinterpret_cast<uintptr_t>(factor.matrix) % (4 * sizeof(T)) == 0;
}

// Elements column .. column + 3 of the rows row, row + kWarps, ...; those outside of the matrix are 0. One branch for
// all rows, and no use of a number before the last load is on its way.
template <typename T, int kRows>
__device__ __forceinline__ void load_rows(const T* matrix, int row, int column, int size, bool vector,
                                          float (&x)[kRows][4]) {
  const T* const from = matrix + static_cast<int64_t>(row) * size + column;
  const int64_t stride = static_cast<int64_t>(kWarps) * size;
  T value[kRows][4];
  if (vector) {
    typename Bits<T>::Type bits[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      bits[r] = typename Bits<T>::Type{};
      if (row + r * kWarps < size && column < size) {
        bits[r] = *reinterpret_cast<const typename Bits<T>::Type*>(from + r * stride);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) memcpy(value[r], &bits[r], sizeof bits[r]);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        value[r][e] = row + r * kWarps < size && column + e < size ? from[r * stride + e] : T{};
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x[r][e] = to_float(value[r][e]);
  }
}

template <typename T>
__device__ __forceinline__ void store_four(T* matrix, int row, int column, int size, bool vector, const T (&x)[4]) {
  T* const to = matrix + static_cast<int64_t>(row) * size + column;
  if (vector && row < size && column < size) {
    typename Bits<T>::Type bits;
    memcpy(&bits, x, sizeof bits);
    *reinterpret_cast<typename Bits<T>::Type*>(to) = bits;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (row < size && column + e < size) to[e] = x[e];
    }
  }
}

// ---- pass 1: M v ---------------------------------------------------------------------------------------------------

// A block multiplies a tile with the part of v for its columns, and its transpose with that for its rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    products_kernel(const Group group, const State state) {
  __shared__ float row_v[kTile], column_v[kTile], column_sum[kWarps][kTile];
  const int index = factor_of_tile(group, static_cast<int>(blockIdx.x));
  const Factor& factor = group.factor[index];
  const int tile = static_cast<int>(blockIdx.x) - factor.first_tile, size = factor.size;
  int tile_row, tile_column;
  place_of(tile, &tile_row, &tile_column);
  const int first_row = tile_row * kTile, first_column = tile_column * kTile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  if (tile == 0 && thread == 0) state.before[index] = state.largest[index];
  {
    const int local = thread % kTile, place = (thread < kTile ? first_row : first_column) + local;
    const float value = place < size ? state.vectors[factor.vector + place] : 0.0f;
    if (thread < kTile) row_v[local] = value; else column_v[local] = value;
  }
  __syncthreads();
  const T* const matrix = static_cast<const T*>(factor.matrix);
  const bool vector = is_aligned<T>(factor);
  float* const partial = state.partial + factor.partial;
  const int64_t padded = static_cast<int64_t>(factor.blocks) * kTile;
  float columns[4] = {}, v[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) v[e] = column_v[4 * lane + e];
#pragma unroll 1
  for (int first = 0; first < kRowsPerWarp; first += kAhead) {
    float x[kAhead][4];  // loaded before any result is stored, since the compiler cannot know that they do not overlap
    load_rows(matrix, first_row + warp + first * kWarps, first_column + 4 * lane, size, vector, x);
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int row = warp + (first + r) * kWarps;
      float dot = 0.0f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dot = keyed::fma_rn(x[r][e], v[e], dot);
        columns[e] = keyed::fma_rn(x[r][e], row_v[row], columns[e]);
      }
      dot = warp_sum(dot);
      if (lane == 31) partial[tile_column * padded + first_row + row] = dot;
    }
  }
  if (tile_row == tile_column) return;
#pragma unroll
  for (int e = 0; e < 4; ++e) column_sum[warp][4 * lane + e] = columns[e];
  __syncthreads();
  if (thread < kTile) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += column_sum[w][thread];
    partial[tile_row * padded + first_column + thread] = sum;
  }
}

// A block adds up kTile elements of u and what they contribute to q.
__global__ void __launch_bounds__(kTile) sums_kernel(const Group group, const State state, const Rule rule) {
  __shared__ double part[kTile];
  const int index = factor_of_block(group, static_cast<int>(blockIdx.x));
  const Factor& factor = group.factor[index];
  const int block = static_cast<int>(blockIdx.x) - factor.first_block, thread = static_cast<int>(threadIdx.x);
  const int row = block * kTile + thread;
  const float* const partial = state.partial + factor.partial + row;
  const int64_t padded = static_cast<int64_t>(factor.blocks) * kTile;
  double product = 0.0;
#pragma unroll 8
  for (int b = 0; b < factor.blocks; ++b) product += static_cast<double>(partial[b * padded]);
  const float v = row < factor.size ? state.vectors[factor.vector + row] : 0.0f;
  const float u = blended_product(rule, blends(rule, state.before[index]), product, v);
  state.u[static_cast<int64_t>(blockIdx.x) * kTile + thread] = u;
  part[thread] = static_cast<double>(u) * static_cast<double>(v);
  for (int half = kTile / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) part[thread] += part[thread + half];
  }
  if (thread == 0) {
    state.q[blockIdx.x] = part[0];
    if (block == 0) state.largest[index] = 0.0f;  // the next launch finds the new one
  }
}

// ---- pass 2: the update --------------------------------------------------------------------------------------------

// What is done to the factor. Every block of a factor comes to the same decision.
__device__ __forceinline__ Step decide_in_block(const Factor& factor, const State& state, const Rule& rule, int index) {
  __shared__ double part[32];
  __shared__ Step step;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    double sum = 0.0;
    for (int b = thread; b < factor.blocks; b += 32) sum += state.q[factor.first_block + b];
    part[thread] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    double q = 0.0;
#pragma unroll
    for (int i = 0; i < 32; ++i) q += part[i];
    step = decide(rule, state.before[index], q);
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
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    update_kernel(const Group group, const State state, const Rule rule) {
  __shared__ float w[2 * kTile];
  __shared__ T strip[kStrip][kTile + (sizeof(T) == 4 ? 1 : 2)];
  const int reversed = static_cast<int>(gridDim.x - 1 - blockIdx.x), index = factor_of_tile(group, reversed);
  const Factor& factor = group.factor[index];
  const int tile = reversed - factor.first_tile, size = factor.size;
  int tile_row, tile_column;
  place_of(tile, &tile_row, &tile_column);
  const int first_row = tile_row * kTile, first_column = tile_column * kTile;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  T* const matrix = static_cast<T*>(factor.matrix);
  const bool vector = is_aligned<T>(factor);
  float x[kStripRows][4];
  load_rows(matrix, first_row + warp, first_column + 4 * lane, size, vector, x);
  const Step step = decide_in_block(factor, state, rule, index);
  if (tile == 0 && thread == 0) {
    state.outcome[index] = step.outcome;
    if (step.outcome == kLeft) state.largest[index] = state.before[index];
  }
  if (step.outcome == kLeft) return;
  const int base = (thread < kTile ? first_row : first_column) + thread % kTile;  // u has a multiple of kTile elements
  const float u = state.u[static_cast<int64_t>(factor.first_block) * kTile + base];
  w[thread] = static_cast<float>(step.factor * static_cast<double>(u));
  __syncthreads();
  float most = 0.0f;
  for (int first = 0; first < kTile; first += kStrip) {
#pragma unroll
    for (int r = 0; r < kStripRows; ++r) {
      const int local = warp + r * kWarps, row = first_row + first + local, column = first_column + 4 * lane;
      T made[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float shift = row == column + e ? step.shift : 0.0f;
        made[e] = round_to<T>(updated(x[r][e], step.scale, shift, w[first + local], w[kTile + 4 * lane + e]));
        if (row < size && column + e < size) most = fmaxf(most, fabsf(to_float(made[e])));
        strip[local][4 * lane + e] = made[e];
      }
      store_four(matrix, row, column, size, vector, made);
    }
    if (first + kStrip < kTile) {
      load_rows(matrix, first_row + first + kStrip + warp, first_column + 4 * lane, size, vector, x);
    }
    if (tile_row == tile_column) continue;
    __syncthreads();
    const int row = first_row + first + lane;  // below the diagonal every column is inside of the matrix
    if (row < size) {
#pragma unroll 4
      for (int column = warp; column < kTile; column += kWarps) {
        matrix[static_cast<int64_t>(first_column + column) * size + row] = strip[lane][column];
      }
    }
    __syncthreads();
  }
  raise(state.largest + index, most);
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t run_group(const Group& group, int tiles, int blocks, const State& state, const Rule& rule,
                      cudaStream_t stream) {
  products_kernel<T><<<tiles, kThreads, 0, stream>>>(group, state);
  sums_kernel<<<blocks, kTile, 0, stream>>>(group, state, rule);
  update_kernel<T><<<tiles, kThreads, 0, stream>>>(group, state, rule);
  return cudaGetLastError();
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
// 128 b^2 floats, u 128 b floats, q b doubles; and before, a float for each of all factors. Returns a cudaError_t.
int ds_efficient_mkor_update(void* const* matrices, const int64_t* sizes, int64_t count, const float* vectors,
                             float* largest, int32_t* outcome, double gamma, double threshold, double zeta,
                             float* partial, float* u, double* q, float* before, int dtype, int device,
                             cudaStream_t stream) {
  cudaError_t error = cudaSetDevice(device);
  if (dtype != mkor::kFloat32 && dtype != mkor::kBfloat16) return cudaErrorInvalidValue;
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
    const int grid = static_cast<int>(tiles), sums = static_cast<int>(rows);
    error = dtype == mkor::kFloat32 ? mkor::run_group<float>(group, grid, sums, state, rule, stream)
                                    : mkor::run_group<mkor::Bfloat16>(group, grid, sums, state, rule, stream);
    vectors += vector;  // later groups use the same scratch memory again: launches of a stream follow each other
  }
  return error;
}

}  // extern "C"
