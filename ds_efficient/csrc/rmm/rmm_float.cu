// S^T X for float32 X with float32 products: never TF32, whatever torch's settings say.
//
// A block of threads makes kColumns columns of S^T X of one block of rows for kFeatures features, a thread 4 columns
// and 8 features. S comes from the key, or is read where it was generated; the next step is loaded while one is
// computed.
#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

constexpr int kColumns = 64, kFeatures = 128, kDepth = 16, kThreads = 256;
constexpr int kPerVector = 4;  // floats
constexpr int kVectors = kDepth * kFeatures / kPerVector / kThreads;  // of X that a thread loads a step
constexpr int kChunks = kDepth * kColumns / kChunk;                   // of S that the threads make a step

struct Step {
  float x[kDepth][kFeatures], s[kDepth][kColumns];
};

struct Tile {
  int64_t block, feature, column;
};

struct Loader {
  const Rows& x;
  const Segment& segment;
  const Tile& tile;
  bool vector;

  // Vector i of this thread: zeros where the block of rows or the features end.
  __device__ __forceinline__ Pack<float, kPerVector> load_x(int64_t row, int i) const {
    const int place = threadIdx.x + i * kThreads;
    const int64_t l = row + place / (kFeatures / kPerVector);
    const int64_t feature = tile.feature + place % (kFeatures / kPerVector) * kPerVector;
    if (l >= segment.block) return Pack<float, kPerVector>{};
    const float* const source = static_cast<const float*>(x.data) + (tile.block * segment.block + l) * x.stride;
    return load_columns<float, kPerVector>(source, feature, x.features, vector);
  }

  __device__ __forceinline__ void store_x(Step& step, int i, const Pack<float, kPerVector>& pack) const {
    const int place = threadIdx.x + i * kThreads;
    const int at = place % (kFeatures / kPerVector) * kPerVector;
#pragma unroll
    for (int e = 0; e < kPerVector; ++e) step.x[place / (kFeatures / kPerVector)][at + e] = pack.value[e];
  }

  template <int kSketch>
  __device__ __forceinline__ void make_s(const UnitElements<kSketch, float>& unit, int64_t row, Step& step) const {
    if (threadIdx.x >= kChunks) return;
    const int r = threadIdx.x / (kColumns / kChunk), at = threadIdx.x % (kColumns / kChunk) * kChunk;
    const int64_t l = row + r, column = tile.column + at;
    float made[kChunk] = {};
    if (l < segment.block && column < segment.projected) {
      unit.make(segment, tile.block * segment.block + l, l, column, made);
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) step.s[r][at + e] = made[e];
  }
};

__device__ __forceinline__ void multiply_step(const Step& step, float (&sum)[4][8]) {
  const int across = threadIdx.x % 16 * 4, down = threadIdx.x / 16 * 4;
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    float s[4], x[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = step.s[k][down + i];
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = step.x[k][across + j / 4 * (kFeatures / 2) + j % 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = keyed::fma_rn(s[i], x[j], sum[i][j]);
    }
  }
}

template <int kSketch>
__global__ void __launch_bounds__(kThreads)
    float_kernel(const Rows x, const Segment segment, uint32_t across, uint32_t chunks, float scale,
                 float* __restrict__ out, bool vector_x, bool vector_out) {
  __shared__ Step steps[2];
  const uint32_t part = blockIdx.x / chunks;
  const Tile tile{part / across, int64_t{part % across} * kFeatures, int64_t{blockIdx.x % chunks} * kColumns};
  const Loader loader{x, segment, tile, vector_x};
  UnitElements<kSketch, float> unit;
  unit.begin(segment, tile.block, tile.column + threadIdx.x % (kColumns / kChunk) * kChunk);
  float sum[4][8] = {};
  Pack<float, kPerVector> next[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) loader.store_x(steps[0], i, loader.load_x(0, i));
  loader.make_s(unit, 0, steps[0]);
  int now = 0;
#pragma unroll 1
  for (int64_t row = 0; row < segment.block; row += kDepth) {
    __syncthreads();
    const bool more = row + kDepth < segment.block;
    if (more) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) next[i] = loader.load_x(row + kDepth, i);
    }
    multiply_step(steps[now], sum);
    now ^= 1;
    if (more) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) loader.store_x(steps[now], i, next[i]);
      loader.make_s(unit, row + kDepth, steps[now]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t column = tile.column + threadIdx.x / 16 * 4 + i;
    if (column >= segment.projected) continue;
    float* const target = out + (tile.block * segment.projected + column) * x.features;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<float, 4> pack;
#pragma unroll
      for (int e = 0; e < 4; ++e) pack.value[e] = sum[i][4 * half + e] * scale;
      const int64_t feature = tile.feature + half * (kFeatures / 2) + threadIdx.x % 16 * 4;
      store_columns(target, feature, x.features, vector_out, pack);
    }
  }
}

template <int kSketch>
cudaError_t launch(const Rows& x, const Segment& segment, float scale, float* out, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(float);
  const int64_t across = ceil_div(x.features, kFeatures), chunks = ceil_div(segment.projected, kColumns);
  const int64_t tiles = segment.blocks * across * chunks;
  if (tiles > kMostBlocks) return cudaErrorInvalidConfiguration;
  float_kernel<kSketch><<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(
      x, segment, static_cast<uint32_t>(across), static_cast<uint32_t>(chunks), scale, out,
      aligned(x.data, x.stride * kSize, kVector), aligned(out, x.features * kSize, kVector));
  return cudaGetLastError();
}

}  // namespace

cudaError_t float_sketch(int sketch, const Rows& x, const Segment& segment, float scale, void* out,
                         cudaStream_t stream) {
  float* const target = static_cast<float*>(out);
  switch (sketch) {
    case kGaussian: return launch<kGaussian>(x, segment, scale, target, stream);
    case kRademacher: return launch<kRademacher>(x, segment, scale, target, stream);
    case kSrht: return launch<kSrht>(x, segment, scale, target, stream);
    case kGiven: return launch<kGiven>(x, segment, scale, target, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace rmm
}  // namespace ds_efficient
