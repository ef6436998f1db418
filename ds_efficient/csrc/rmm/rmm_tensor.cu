// S^T X on tensor cores for 16-bit X, float32 sums; S is made from the key in the tile, or read where it was generated.
//
// A tile is one block of rows, kFeatures features and up to kP columns of S, so that X is read once for p <= 128; for
// more columns the tiles of the same part of X follow each other and find it in the L2 cache. The blocks of threads
// are persistent: copies of X run kStages - 1 steps of kDepth rows ahead, also across the end of a tile.
//
// How S comes into the tile, counted for p = 64 in issue slots of a multiprocessor's scheduler. A step of 32 rows and
// 256 features is 16 KB of X, about 1250 cycles of a multiprocessor's share of 3 TB/s; its products and loads of
// fragments take about 100. A thread makes 8 elements of S a step, 8 warps on 4 schedulers:
//   signs      one Philox block, 65 instructions, and 12 to place them: 150 cycles. Made here.
//   srht       the same for the row's sign, and 8 parities at a quarter of the rate: 300 cycles. Made here.
//   normals    two Philox blocks and 8 quantiles of 35 instructions: 850 cycles, and twice that for p = 128, again for
//              each of features / 256 tiles. Generating S once takes 2 to 3 microseconds, its tile comes out of the L2
//              cache at a quarter (p = 64) or half (p = 128) of the bytes of X. So kGiven is the way for large
//              matrices; where S is small, a launch costs more than what it saves. Both are here.
#include <cuda_pipeline.h>

#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

constexpr int kDepth = 32, kStages = 4;    // rows of a step; steps in shared memory
constexpr int kWarpFeatures = 32, kWarpsAcross = 8, kFeatures = kWarpFeatures * kWarpsAcross;
constexpr int kTileVectors = kFeatures / kChunk;  // 16-byte vectors of a row of X in a tile

// kFragments 16-row fragments a warp, kWarpsDown warps below each other.
template <int kFragments, int kWarpsDown>
struct Shape {
  static constexpr int kP = 16 * kFragments * kWarpsDown;
  static constexpr int kThreads = 32 * kWarpsAcross * kWarpsDown;
  static constexpr int kResident = kWarpsDown == 1 ? 2 : 1;  // blocks of a multiprocessor
  static constexpr int kVectors = (kP < 64 ? 64 : kP) / kChunk;  // of a row of S, at least 8 for the swizzle
  static constexpr int kStage = kDepth * (kTileVectors + kVectors) * kVector;  // bytes
  static_assert(kDepth * kP / kChunk <= kThreads, "a thread makes at most one chunk of S a step");
};

struct Grid {
  uint32_t tiles, across, chunks;  // tiles in all; parts of the features, parts of the columns of S
};

struct Layout {
  bool x, s, out;  // whether rows are aligned to 16 bytes
};

struct Place {
  int64_t block, feature, column;
};

template <int kP>
__device__ __forceinline__ Place place_of(uint32_t tile, const Grid& grid) {
  const uint32_t part = tile / grid.chunks;
  return Place{part / grid.across, int64_t{part % grid.across} * kFeatures, int64_t{tile % grid.chunks} * kP};
}

// Where vector `at` of row `row` lies: eight rows of one column of vectors are in different banks.
template <int kVectors>
__device__ __forceinline__ char* vector_at(char* base, int row, int at) {
  return base + (row * kVectors + (at ^ (row & 7))) * kVector;
}

template <typename Pack>
__device__ __forceinline__ void store_shared(char* to, const Pack& pack) {
  static_assert(sizeof(Pack) == kVector, "one store");
  uint4 bits;
  memcpy(&bits, &pack, sizeof bits);
  *reinterpret_cast<uint4*>(to) = bits;
}

// `exists` elements, 0 or more, from `from` on; zeros behind them.
template <typename T>
__device__ __forceinline__ void copy_vector(char* to, const T* from, int64_t exists, bool vector) {
  if (vector) {
    const int64_t most = kVector / int64_t{sizeof(T)};
    copy_async(to, from, static_cast<int>(exists < most ? exists : most) * static_cast<int>(sizeof(T)));
  } else {
    Pack<T, kChunk> pack;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) pack.value[e] = e < exists ? load_one(from + e) : T{};
    store_shared(to, pack);
  }
}

// Fills the steps in shared memory, one after the other through all tiles of this block of threads.
template <typename T, int kSketch, typename Shape>
struct Loader {
  const Rows& x;
  const Segment& segment;
  const Grid& grid;
  const Layout& layout;
  uint32_t tile;
  Place place;
  int64_t row = 0;  // of the block of rows
  UnitElements<kSketch, T> unit;

  __device__ __forceinline__ int chunk() const { return threadIdx.x % (Shape::kP / kChunk); }
  __device__ __forceinline__ int chunk_row() const { return threadIdx.x / (Shape::kP / kChunk); }

  __device__ __forceinline__ void begin() {
    place = place_of<Shape::kP>(tile, grid);
    unit.begin(segment, place.block, place.column + chunk() * kChunk);
  }

  __device__ __forceinline__ void load_x(char* to) const {
    constexpr int kStep = Shape::kThreads / kTileVectors;
    const int at = threadIdx.x % kTileVectors, first = threadIdx.x / kTileVectors;
    const int64_t left = x.features - place.feature - at * kChunk;
    const T* const source = static_cast<const T*>(x.data) + place.feature + at * kChunk;
    const int64_t start = place.block * segment.block + row;
#pragma unroll
    for (int r = 0; r < kDepth; r += kStep) {
      const bool exists = row + first + r < segment.block && left > 0;
      const T* const from = exists ? source + (start + first + r) * x.stride : static_cast<const T*>(x.data);
      copy_vector(vector_at<kTileVectors>(to, first + r, at), from, exists ? left : 0, layout.x);
    }
  }

  __device__ __forceinline__ void load_s(char* to) const {
    if (chunk_row() >= kDepth) return;
    const int64_t l = row + chunk_row(), q = place.block * segment.block + l, column = place.column + chunk() * kChunk;
    char* const target = vector_at<Shape::kVectors>(to, chunk_row(), chunk());
    const bool exists = l < segment.block && column < segment.projected;
    if (kSketch == kGiven) {
      const T* const matrix = static_cast<const T*>(segment.matrix);
      copy_vector(target, exists ? matrix + q * segment.projected + column : matrix,
                  exists ? segment.projected - column : 0, layout.s);
    } else {
      Pack<T, kChunk> pack{};
      if (exists) unit.make(segment, q, l, column, pack.value);
      store_shared(target, pack);
    }
  }

  // The next step; nothing after the last tile, but the copies are counted all the same.
  __device__ __forceinline__ void load(char* stage) {
    if (tile < grid.tiles) {
      load_x(stage);
      load_s(stage + kDepth * kTileVectors * kVector);
      row += kDepth;
      if (row >= segment.block) {
        row = 0;
        tile += gridDim.x;
        if (tile < grid.tiles) begin();
      }
    }
    __pipeline_commit();
  }
};

// sum += S^T X of a step, for this warp's columns of S and features.
template <typename T, int kFragments, int kWarpsDown>
__device__ __forceinline__ void multiply_step(char* stage, float (&sum)[kFragments][4][4]) {
  constexpr int kVectors = Shape<kFragments, kWarpsDown>::kVectors;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane % 8, matrix = lane / 8;
  const int across = warp % kWarpsAcross * (kWarpFeatures / kChunk), down = warp / kWarpsAcross * kFragments * 2;
  char* const s = stage + kDepth * kTileVectors * kVector;
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[kFragments][4], b[2][4];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {  // matrices: columns 0-7 and 8-15 of S, in rows 0-7, then in rows 8-15
      load_matrices_transposed(a[i], vector_at<kVectors>(s, k + matrix / 2 * 8 + row, down + 2 * i + matrix % 2));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // matrices: rows 0-7 and 8-15 of X, of features 0-7, then of features 8-15
      load_matrices_transposed(b[i],
                               vector_at<kTileVectors>(stage, k + matrix % 2 * 8 + row, across + 2 * i + matrix / 2));
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) multiply_add<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Lane t of four holds element t of what the four held before: a 4x4 transpose.
__device__ __forceinline__ void transpose_in_quad(uint32_t (&part)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? part[i] : part[i + step], step);
      part[i] = upper ? got : part[i];
      part[i + step] = upper ? part[i + step] : got;
    }
  }
}

template <typename T, int kFragments>
__device__ __forceinline__ void store_sums(const float (&sum)[kFragments][4][4], const Place& place,
                                           const Segment& segment, int64_t features, float scale, T* out,
                                           bool vector) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = place.column + warp / kWarpsAcross * kFragments * 16 + lane / 4;
  const int64_t feature = place.feature + warp % kWarpsAcross * kWarpFeatures + lane % 4 * kChunk;
#pragma unroll
  for (int i = 0; i < 2 * kFragments; ++i) {
    uint32_t part[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Pack<T, 2> two;
      two.value[0] = round_to<T>(sum[i / 2][j][i % 2 * 2] * scale);
      two.value[1] = round_to<T>(sum[i / 2][j][i % 2 * 2 + 1] * scale);
      memcpy(&part[j], &two, sizeof two);
    }
    transpose_in_quad(part);
    const int64_t column = first + i * 8;
    if (column < segment.projected && feature < features) {
      Pack<T, kChunk> pack;
      memcpy(&pack, part, sizeof pack);
      store_columns(out + (place.block * segment.projected + column) * features, feature, features, vector, pack);
    }
  }
}

template <typename T, int kSketch, int kFragments, int kWarpsDown>
__global__ void __launch_bounds__(Shape<kFragments, kWarpsDown>::kThreads, Shape<kFragments, kWarpsDown>::kResident)
    tensor_kernel(const Rows x, const Segment segment, const Grid grid, const Layout layout, float scale,
                  T* __restrict__ out) {
  using Tile = Shape<kFragments, kWarpsDown>;
  char* const memory = dynamic_shared();
  Loader<T, kSketch, Tile> loader{x, segment, grid, layout, blockIdx.x, {}, 0, {}};
  loader.begin();
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) loader.load(memory + stage * Tile::kStage);
  int now = 0, next = kStages - 1;
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < grid.tiles; tile += gridDim.x) {
    float sum[kFragments][4][4] = {};
#pragma unroll 1
    for (int64_t row = 0; row < segment.block; row += kDepth) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();  // this step is there for all threads, and all have left the one before
      loader.load(memory + next * Tile::kStage);
      multiply_step<T, kFragments, kWarpsDown>(memory + now * Tile::kStage, sum);
      next = now;
      now = now + 1 == kStages ? 0 : now + 1;
    }
    store_sums<T, kFragments>(sum, place_of<Tile::kP>(tile, grid), segment, x.features, scale, out, layout.out);
  }
}

template <typename T, int kSketch, int kFragments, int kWarpsDown>
cudaError_t launch(const Rows& x, const Segment& segment, float scale, T* out, int device, cudaStream_t stream) {
  using Tile = Shape<kFragments, kWarpsDown>;
  constexpr int64_t kSize = sizeof(T);
  const int64_t across = ceil_div(x.features, kFeatures), chunks = ceil_div(segment.projected, Tile::kP);
  const int64_t tiles = segment.blocks * across * chunks;
  if (tiles > kMostBlocks) return cudaErrorInvalidConfiguration;
  int processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto kernel = tensor_kernel<T, kSketch, kFragments, kWarpsDown>;
  constexpr int kBytes = kStages * Tile::kStage;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const Grid grid{static_cast<uint32_t>(tiles), static_cast<uint32_t>(across), static_cast<uint32_t>(chunks)};
  const int64_t resident = int64_t{processors} * Tile::kResident, blocks = tiles < resident ? tiles : resident;
  const Layout layout{aligned(x.data, x.stride * kSize, kVector) || (segment.blocks * segment.block == 1 &&
                                                                     aligned(x.data, 0, kVector)),
                      aligned(segment.matrix, segment.projected * kSize, kVector),
                      aligned(out, x.features * kSize, kVector)};
  kernel<<<static_cast<unsigned>(blocks), Tile::kThreads, kBytes, stream>>>(x, segment, grid, layout, scale, out);
  return cudaGetLastError();
}

template <typename T, int kSketch>
cudaError_t choose_shape(const Rows& x, const Segment& segment, float scale, void* out, int device,
                         cudaStream_t stream) {
  T* const target = static_cast<T*>(out);
  if (segment.projected <= 32) return launch<T, kSketch, 2, 1>(x, segment, scale, target, device, stream);
  if (segment.projected <= 64) return launch<T, kSketch, 4, 1>(x, segment, scale, target, device, stream);
  return launch<T, kSketch, 4, 2>(x, segment, scale, target, device, stream);
}

template <typename T>
cudaError_t choose_sketch(int sketch, const Rows& x, const Segment& segment, float scale, void* out, int device,
                          cudaStream_t stream) {
  switch (sketch) {
    case kGaussian: return choose_shape<T, kGaussian>(x, segment, scale, out, device, stream);
    case kRademacher: return choose_shape<T, kRademacher>(x, segment, scale, out, device, stream);
    case kSrht: return choose_shape<T, kSrht>(x, segment, scale, out, device, stream);
    case kGiven: return choose_shape<T, kGiven>(x, segment, scale, out, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t tensor_sketch(int sketch, const Rows& x, const Segment& segment, float scale, void* out, int dtype,
                          int device, cudaStream_t stream) {
  switch (dtype) {
    case kBfloat16: return choose_sketch<Bfloat16>(sketch, x, segment, scale, out, device, stream);
    case kFloat16: return choose_sketch<Float16>(sketch, x, segment, scale, out, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace rmm
}  // namespace ds_efficient
