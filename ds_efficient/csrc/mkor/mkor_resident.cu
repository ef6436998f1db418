// The rank-1 update of factors whose tiles all lie in the processors at a time; see mkor_cuda.cu for the two passes. No
// torch headers.
//
// A launch has at most as many blocks as the device holds together, one a tile. A block reads its tile once, multiplies
// it, and keeps it, half in registers and half in shared memory, until all blocks have come to a barrier of the grid;
// then it updates the tile and writes it. Memory traffic: d^2 / 2 elements read and d^2 written, 3/4 of reading and
// writing M, and one launch in place of two or three.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "mkor_tiles.h"

namespace ds_efficient {
namespace mkor {
namespace {

template <typename T>
constexpr int kHalf = kTile / Share<T>::kRows / 2;  // steps of half a tile
template <typename T>
constexpr int kHeldBytes = kHalf<T> * kThreads * 16;

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    resident_kernel(const Group group, const State state, const Rule rule) {
  constexpr int kSteps = Strip<T>::kSteps;
  static_assert(kHalf<T> % kSteps == 0, "whole strips");
  static_assert(Strip<T>::kAll >= Share<T>::kRows * kTile, "the sums of columns use the strip's memory");
  extern __shared__ uint4 held[];                   // (kHalf, kThreads): the rows of the upper half
  __shared__ float both[2 * kTile];                 // v, then w, for the tile's rows and columns
  __shared__ uint32_t strip[Strip<T>::kAll];
  const Factor& factor = group.factor[factor_of(group, static_cast<int>(blockIdx.x), &Factor::first_tile)];
  const Tile<T> tile(factor, static_cast<int>(blockIdx.x) - factor.first_tile);
  const int place = factor.place;
  if (tile.first && tile.thread == 0) {
    state.before[place] = state.largest[place];
    state.largest[place] = 0.0f;  // the update finds the new one
  }
  uint4 bits[kHalf<T>];
  {
    Products<T> products(tile, state, both);
    tile.load(0, bits);
    products.add(tile, state, bits, 0, both);
#pragma unroll
    for (int r = 0; r < kHalf<T>; ++r) held[r * kThreads + tile.thread] = bits[r];
    tile.load(kTile / 2, bits);
    products.add(tile, state, bits, kTile / 2, both);
    products.finish(tile, state, reinterpret_cast<float(*)[kTile]>(strip), true);
  }
  cooperative_groups::this_grid().sync();
  const float before = state.before[place];
  const double u = sum_of_parts(factor, state, rule, blends(rule, before), tile.border());
  const Step step =
      decide_in_block(state.q + 2 * static_cast<int64_t>(factor.first_tile), tiles_of(factor), before, rule,
                      limits_of<T>());
  if (tile.first && tile.thread == 0) {
    state.outcome[place] = step.outcome;
    if (step.outcome == kLeft) state.largest[place] = before;
  }
  if (step.outcome == kLeft) return;
  both[tile.thread] = step.factor == 0.0 ? 0.0f : static_cast<float>(step.factor * u);
  __syncthreads();
  Update<T> update{tile, step, both, strip};
  uint4 some[kSteps];
#pragma unroll
  for (int first = 0; first < kHalf<T>; first += kSteps) {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) some[r] = bits[first + r];
    update.write(some, kTile / 2 + first * Share<T>::kRows);
    update.mirror(kTile / 2 + first * Share<T>::kRows);
  }
#pragma unroll 1
  for (int first = 0; first < kHalf<T>; first += kSteps) {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) some[r] = held[(first + r) * kThreads + tile.thread];
    update.write(some, first * Share<T>::kRows);
    update.mirror(first * Share<T>::kRows);
  }
  update.raise(state.largest + place);
}

// The blocks that the device holds together, and leave for the kernel to use the memory that it needs.
template <typename T>
int tiles_together(int device) {
  int together = 0, processors = 0, blocks = 0;
  if (cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device) != cudaSuccess || !together ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaFuncSetAttribute(resident_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kHeldBytes<T>) !=
          cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, resident_kernel<T>, kThreads, kHeldBytes<T>) !=
          cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return processors * blocks;
}

template <typename T>
cudaError_t launch(const Group& group, int tiles, const State& state, const Rule& rule, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tiles));
  config.blockDim = dim3(static_cast<unsigned>(kThreads));
  config.dynamicSmemBytes = kHeldBytes<T>;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, resident_kernel<T>, group, state, rule);
}

}  // namespace

int resident_tiles(int dtype, int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[3][kDevices];  // 0: not asked yet, else one more than the number
  if (device < 0 || device >= kDevices) return 0;
  int tiles = known[dtype][device].load();
  if (!tiles) {
    tiles = 1 + (dtype == kFloat32    ? tiles_together<float>(device)
                 : dtype == kBfloat16 ? tiles_together<Bfloat16>(device)
                                      : tiles_together<Float16>(device));
    known[dtype][device].store(tiles);
  }
  return tiles - 1;
}

cudaError_t run_resident(const Group& group, int tiles, const State& state, const Rule& rule, int dtype,
                         cudaStream_t stream) {
  const auto run = dtype == kFloat32 ? launch<float> : dtype == kBfloat16 ? launch<Bfloat16> : launch<Float16>;
  return run(group, tiles, state, rule, stream);
}

}  // namespace mkor
}  // namespace ds_efficient
