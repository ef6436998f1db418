// The grouped rank-1 update on CUDA devices; see mkor_common.h. No torch headers.
//
// M is symmetric, so tiles of its lower triangle suffice for M v, and for the update, which writes each new tile twice,
// the second time transposed. M v needs all of M before the update can begin, hence two passes, in one of two ways:
//
// - Factors of at most as many tiles as the device's blocks have room for together, d = 4096 on an H100, are updated by
//   one launch that keeps its tiles (mkor_resident.cu), several small factors at a time.
// - For others there is a launch for each pass. Memory traffic of a matrix that does not fit in the L2 cache: d^2 / 2
//   elements read for M v, d^2 / 2 read and d^2 written for the update: as much as reading and writing M once. The
//   update goes through the tiles in reverse order, so that it finds the last ones of the first pass in the cache.
//
// Blocks of a launch share the tiles of all its factors. For few tiles, where the time between launches counts, and for
// few parts (d up to 1024), the update adds up the parts of M v by itself, each block those of its rows and columns,
// and q comes from the tiles; beyond that a launch between the two does it once. Where the device can, a kernel begins
// while the one before is ending: it finds its tile and loads its first rows, which nobody writes before the update.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "mkor_tiles.h"

namespace ds_efficient {
namespace mkor {
namespace {

constexpr int kFewBlocks = 8, kFewTiles = 1056;  // beyond both, adding up in every block costs more than a launch

// A block multiplies a tile with the part of v for its columns, and its transpose with that for its rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    products_kernel(const Group group, const State state, bool fused) {
  using S = Share<T>;
  constexpr int kAhead = sizeof(T) == 4 ? 8 : 4;  // steps whose loads are on their way together
  __shared__ float both[2 * kTile], column_sum[S::kRows][kTile];
  let_next_begin();
  const Factor& factor = group.factor[factor_of(group, static_cast<int>(blockIdx.x), &Factor::first_tile)];
  const Tile<T> tile(factor, static_cast<int>(blockIdx.x) - factor.first_tile);
  if (tile.first && tile.thread == 0) {
    state.before[factor.place] = state.largest[factor.place];
    if (fused) state.largest[factor.place] = 0.0f;  // the update finds the new one
  }
  Products<T> products(tile, state, both);
#pragma unroll 1
  for (int first = 0; first < kTile; first += kAhead * S::kRows) {
    uint4 bits[kAhead];  // loaded before any result is stored, since the compiler cannot know that they do not overlap
    tile.load(first, bits);
    products.add(tile, state, bits, first, both);
  }
  products.finish(tile, state, column_sum, fused);
}

// A block adds up kTile elements of u and what they contribute to q.
__global__ void __launch_bounds__(kTile) sums_kernel(const Group group, const State state, const Rule rule) {
  __shared__ double part[2][kTile];
  let_next_begin();
  const Factor& factor = group.factor[factor_of(group, static_cast<int>(blockIdx.x), &Factor::first_block)];
  const int block = static_cast<int>(blockIdx.x) - factor.first_block, thread = static_cast<int>(threadIdx.x);
  const int row = block * kTile + thread;
  const float v = row < factor.size ? state.vectors[factor.vector + row] : 0.0f;
  wait_for_previous();
  const double product = product_of(factor, state, row);
  const float u = blended_product(rule, blends(rule, state.before[factor.place]), product, v);
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
    if (block == 0) state.largest[factor.place] = 0.0f;  // the update finds the new one
  }
}

// A block updates a tile, strip by strip, and writes it to both sides of the diagonal.
template <typename T, bool kAdds>
__global__ void __launch_bounds__(kThreads, kResident)
    update_kernel(const Group group, const State state, const Rule rule) {
  __shared__ float w[2 * kTile];
  __shared__ uint32_t strip[Strip<T>::kAll];
  const int reversed = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const Factor& factor = group.factor[factor_of(group, reversed, &Factor::first_tile)];
  const Tile<T> tile(factor, reversed - factor.first_tile);
  const int place = factor.place;
  uint4 bits[Strip<T>::kSteps];
  tile.load(0, bits);
  wait_for_previous();
  const float before = state.before[place];
  double u;
  if (kAdds) {
    u = sum_of_parts(factor, state, rule, blends(rule, before), tile.border());
  } else {
    u = static_cast<double>(state.u[static_cast<int64_t>(factor.first_block) * kTile + tile.border()]);
  }
  const double* const q = state.q + 2 * static_cast<int64_t>(kAdds ? factor.first_tile : factor.first_block);
  const Step step = decide_in_block(q, kAdds ? tiles_of(factor) : factor.blocks, before, rule, limits_of<T>());
  if (tile.first && tile.thread == 0) {
    state.outcome[place] = step.outcome;
    if (step.outcome == kLeft) state.largest[place] = before;
  }
  if (step.outcome == kLeft) return;
  w[tile.thread] = step.factor == 0.0 ? 0.0f : static_cast<float>(step.factor * u);
  __syncthreads();
  Update<T> update{tile, step, w, strip};
  for (int first = 0; first < kTile; first += Strip<T>::kRows) {
    update.write(bits, first);
    if (first + Strip<T>::kRows < kTile) tile.load(first + Strip<T>::kRows, bits);
    update.mirror(first);
  }
  update.raise(state.largest + place);
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <typename T>
cudaError_t run_passes(const Group& group, int tiles, int blocks, const State& state, const Rule& rule, int most_fused,
                       int device, cudaStream_t stream) {
  int most = 0;
  for (int i = 0; i < group.count; ++i) most = std::max(most, static_cast<int>(group.factor[i].blocks));
  const bool fused = most <= most_fused && (most <= kFewBlocks || tiles <= kFewTiles);
  const bool early = begins_early(device);
  products_kernel<T><<<tiles, kThreads, 0, stream>>>(group, state, fused);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  if (fused) return launch_after(update_kernel<T, true>, tiles, kThreads, early, stream, group, state, rule);
  error = launch_after(sums_kernel, blocks, kTile, early, stream, group, state, rule);
  if (error != cudaSuccess) return error;
  return launch_after(update_kernel<T, false>, tiles, kThreads, early, stream, group, state, rule);
}

// The factors of a call, and those of them that the next launch takes.
struct Call {
  void* const* matrices;
  const int64_t* sizes;
  int64_t count;
  std::vector<int64_t> vector;  // elements of all vectors before those of a factor
  std::vector<bool> done;

  Call(void* const* its_matrices, const int64_t* its_sizes, int64_t its_count)
      : matrices(its_matrices), sizes(its_sizes), count(its_count), vector(its_count + 1), done(its_count) {
    for (int64_t i = 0; i < count; ++i) vector[i + 1] = vector[i] + sizes[i];
  }
  static int64_t blocks_of(int64_t size) { return (size + kTile - 1) / kTile; }
  static int64_t tiles_of(int64_t size) { return blocks_of(size) * (blocks_of(size) + 1) / 2; }

  // The next factors from `first` on of which each has `least` tiles or more and all together have at most `most`;
  // counts their tiles and rows of tiles.
  Group take(int64_t first, int64_t least, int64_t most, int64_t* tiles, int64_t* rows) {
    Group group;
    memset(&group, 0, sizeof group);
    *tiles = *rows = 0;
    int64_t partial = 0;
    for (int64_t i = first; i < count && group.count < kMost; ++i) {
      const int64_t blocks = blocks_of(sizes[i]), its_tiles = tiles_of(sizes[i]);
      if (done[i] || its_tiles < least || *tiles + its_tiles > most) continue;
      group.factor[group.count++] =
          Factor{matrices[i], static_cast<int32_t>(vector[i]), static_cast<int32_t>(partial),
                 static_cast<int32_t>(sizes[i]), static_cast<int32_t>(blocks), static_cast<int32_t>(*tiles),
                 static_cast<int32_t>(*rows), static_cast<int32_t>(i)};
      *tiles += its_tiles;
      *rows += blocks;
      partial += blocks * blocks;
      done[i] = true;
    }
    return group;
  }
};

}  // namespace
}  // namespace mkor
}  // namespace ds_efficient

extern "C" {

using namespace ds_efficient;

int ds_efficient_mkor_version() { return DS_EFFICIENT_MKOR_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Update `count` factors in place. matrices, sizes: of each factor the address and d, in host memory; vectors: all v
// one behind the other. Scratch memory on the device, with b = ceil(d / 128) of each factor of a launch: partial
// 128 b^2 floats, u 128 b floats, q b (b + 1) doubles; and before, a float for each of all factors. A launch has any 96
// of the factors, or any with at most most_resident tiles, b (b + 1) / 2 each, together.
// most_fused: rows of tiles up to which two launches may do; most_resident: tiles up to which one launch may, which also
// depends on the device. Returns a cudaError_t.
int ds_efficient_mkor_update(void* const* matrices, const int64_t* sizes, int64_t count, const float* vectors,
                             float* largest, int32_t* outcome, double gamma, double threshold, double zeta,
                             float* partial, float* u, double* q, float* before, int most_fused, int most_resident,
                             int dtype, int device, cudaStream_t stream) {
  cudaError_t error = cudaSetDevice(device);
  if (dtype < mkor::kFloat32 || dtype > mkor::kFloat16) return cudaErrorInvalidValue;
  mkor::Call call(matrices, sizes, count);
  if (call.vector[count] > 0x7fffffff) return cudaErrorInvalidValue;
  const mkor::Rule rule{gamma, threshold, zeta};
  const mkor::State state{vectors, largest, outcome, partial, u, q, before};
  const int64_t resident = std::min(most_resident, mkor::resident_tiles(dtype, device));
  const auto passes = dtype == mkor::kFloat32    ? mkor::run_passes<float>
                      : dtype == mkor::kBfloat16 ? mkor::run_passes<mkor::Bfloat16>
                                                 : mkor::run_passes<mkor::Float16>;
  for (int64_t first = 0; first < count && error == cudaSuccess; ++first) {
    if (call.done[first]) continue;
    // Launches of a stream follow each other, so each may use the scratch memory of the one before.
    int64_t tiles, rows;
    const bool fits = mkor::Call::tiles_of(sizes[first]) <= resident;
    const mkor::Group group = fits ? call.take(first, 1, resident, &tiles, &rows)
                                   : call.take(first, resident + 1, 0x7fffffff, &tiles, &rows);
    if (group.count == 0) return cudaErrorInvalidValue;
    error = fits ? mkor::run_resident(group, static_cast<int>(tiles), state, rule, dtype, stream)
                 : passes(group, static_cast<int>(tiles), static_cast<int>(rows), state, rule, most_fused, device,
                          stream);
  }
  return error;
}

}  // extern "C"
