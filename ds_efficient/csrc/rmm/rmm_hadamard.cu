// Subsampled randomised Hadamard transform by butterflies: the same S^T X as the product with the signs
// d_i (-1)^popcount(l & r_c), in n log n instead of n p additions. It pays where p is in the thousands; below
// that the product with a generated S on tensor cores runs close to the bandwidth of X.
//
// A block of threads takes one block of rows and a few features, all in shared memory in float32. A pass does up to
// kBits of the log2 n butterfly levels in registers; the first reads X, with signs, zeros behind the last row. Blocks
// of threads beside each other take adjacent features, so that a sector of X is fetched from memory once.
#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

constexpr int kBits = 4, kThreads = 512;
constexpr int64_t kUsualBytes = 1 << 16;  // of values, so that two blocks of threads share a multiprocessor
constexpr int kMostFeatures = 32, kFewestFeatures = 8;
static_assert(kHadamardLimit == 16384, "row numbers fit and one feature fits the smallest shared memory, 96 KB");

// A segment of blocks as rmm_common.h has it.
struct Segment {
  uint64_t key;
  int64_t base_row, block, projected;
  const int64_t* chosen;
  int64_t blocks;
};

struct Shape {
  int rows_log, features_log;  // log2 of n and of the features of a block of threads
  uint32_t across;             // parts of the features
};

// One word of padding after 32, so that lanes 2^j words apart are in different banks.
__device__ __forceinline__ int padded(int index) { return index + (index >> 5); }
inline int64_t padded_bytes(int64_t values) { return (values + values / 32) * int64_t{sizeof(float)}; }
inline int64_t sign_bytes(int64_t n) { return (n / 32 + 2) * int64_t{sizeof(uint32_t)}; }

// Levels low .. low + kLevels - 1 of the transform. get(row, feature) and put(row, feature, value).
template <int kLevels, typename Get, typename Put>
__device__ __forceinline__ void pass(const Shape& shape, int low, const Get& get, const Put& put) {
  constexpr int kCount = 1 << kLevels;
  const int lines = 1 << (shape.rows_log + shape.features_log - kLevels);
#pragma unroll 1
  for (int line = threadIdx.x; line < lines; line += kThreads) {
    const int feature = line & ((1 << shape.features_log) - 1), rest = line >> shape.features_log;
    const int row = ((rest >> low) << (low + kLevels)) | (rest & ((1 << low) - 1));
    float value[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) value[e] = get(row + (e << low), feature);
#pragma unroll
    for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (e & step) continue;
        const float sum = value[e] + value[e + step], difference = value[e] - value[e + step];
        value[e] = sum;
        value[e + step] = difference;
      }
    }
#pragma unroll
    for (int e = 0; e < kCount; ++e) put(row + (e << low), feature, value[e]);
  }
}

template <typename Get, typename Put>
__device__ __forceinline__ void pass_of(int levels, const Shape& shape, int low, const Get& get, const Put& put) {
  switch (levels) {
    case 0: return pass<0>(shape, low, get, put);
    case 1: return pass<1>(shape, low, get, put);
    case 2: return pass<2>(shape, low, get, put);
    case 3: return pass<3>(shape, low, get, put);
    default: return pass<kBits>(shape, low, get, put);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    hadamard_kernel(const Rows x, const Segment segment, const Shape shape, float scale, T* __restrict__ out) {
  extern __shared__ uint32_t dynamic_shared[];
  const int n = 1 << shape.rows_log;
  uint32_t* const sign = dynamic_shared;
  float* const values = reinterpret_cast<float*>(sign + n / 32 + 2);
  const int64_t block = blockIdx.x / shape.across, first_row = block * segment.block;
  const int64_t first_feature = int64_t{blockIdx.x % shape.across} << shape.features_log;
  const uint64_t global = static_cast<uint64_t>(segment.base_row + first_row);
  for (int i = threadIdx.x; i < n / 32 + 2; i += kThreads) sign[i] = one_word(segment.key, global / 32 + i);
  __syncthreads();

  const T* const source = static_cast<const T*>(x.data) + first_row * x.stride + first_feature;
  const int shift = static_cast<int>(global % 32);
  const auto read = [&](int row, int feature) {
    if (row >= segment.block || first_feature + feature >= x.features) return 0.0f;
    const float value = to_float(load_one(source + row * x.stride + feature));
    return negative_bit(sign[(row + shift) / 32], row + shift) ? -value : value;
  };
  const auto get = [&](int row, int feature) { return values[padded((row << shape.features_log) + feature)]; };
  const auto put = [&](int row, int feature, float value) {
    values[padded((row << shape.features_log) + feature)] = value;
  };
  const int first = shape.rows_log < kBits ? shape.rows_log : kBits;
  int low = shape.rows_log - first;  // from the high levels down: the first pass reads adjacent rows side by side
  pass_of(first, shape, low, read, put);
  __syncthreads();
#pragma unroll 1
  while (low > 0) {
    const int levels = low < kBits ? low : kBits;
    low -= levels;
    pass_of(levels, shape, low, get, put);
    __syncthreads();
  }

  const int64_t total = segment.projected << shape.features_log;
  for (int64_t p = threadIdx.x; p < total; p += kThreads) {
    const int feature = static_cast<int>(p & ((1 << shape.features_log) - 1));
    if (first_feature + feature >= x.features) continue;
    const int64_t made = block * segment.projected + (p >> shape.features_log);
    const int frequency = static_cast<int>(__ldg(segment.chosen + made));
    out[made * x.features + first_feature + feature] = round_to<T>(get(frequency, feature) * scale);
  }
}

template <typename T>
cudaError_t hadamard(const Rows& x, const Segment& segment, float scale, void* out, int device, cudaStream_t stream) {
  const int64_t n = padded_rows(segment.block);
  int most = 0;
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  int64_t features = kMostFeatures;
  while (features > kFewestFeatures && n * features * int64_t{sizeof(float)} > kUsualBytes) features /= 2;
  while (features > 1 && sign_bytes(n) + padded_bytes(n * features) > most) features /= 2;
  const int64_t bytes = sign_bytes(n) + padded_bytes(n * features);
  const int64_t across = ceil_div(x.features, features), tiles = segment.blocks * across;
  if (n > kHadamardLimit || bytes > most || tiles > kMostBlocks) return cudaErrorInvalidConfiguration;
  Shape shape{0, 0, static_cast<uint32_t>(across)};
  while (int64_t{1} << shape.rows_log < n) ++shape.rows_log;
  while (int64_t{1} << shape.features_log < features) ++shape.features_log;
  error = cudaFuncSetAttribute(hadamard_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  hadamard_kernel<T><<<static_cast<unsigned>(tiles), kThreads, static_cast<unsigned>(bytes), stream>>>(
      x, segment, shape, scale, static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace
}  // namespace rmm
}  // namespace ds_efficient

extern "C" {

// See rmm_common.h; cudaErrorInvalidConfiguration where the block is longer than kHadamardLimit.
int ds_efficient_rmm_hadamard(const void* x, int64_t stride, int64_t features, uint64_t key, int64_t base_row,
                              int64_t block, int64_t projected, const int64_t* chosen, int64_t blocks, double scale,
                              void* out, int dtype, int device, cudaStream_t stream) {
  using namespace ds_efficient;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || blocks == 0 || block == 0 || projected == 0 || features == 0) return error;
  const rmm::Rows rows{x, stride, features};
  const rmm::Segment segment{key, base_row, block, projected, chosen, blocks};
  const float factor = static_cast<float>(scale);
  switch (dtype) {
    case rmm::kFloat32: return rmm::hadamard<float>(rows, segment, factor, out, device, stream);
    case rmm::kBfloat16: return rmm::hadamard<rmm::Bfloat16>(rows, segment, factor, out, device, stream);
    case rmm::kFloat16: return rmm::hadamard<rmm::Float16>(rows, segment, factor, out, device, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
