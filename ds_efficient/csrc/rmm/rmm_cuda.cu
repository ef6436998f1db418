// Random sketches on CUDA devices: C ABI of rmm_common.h and the generated S. No torch headers.
#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

constexpr int kThreads = 256;

// Unit elements of rows first .. first + rows - 1; a thread makes kChunk columns of a row.
template <int kSketch, typename T>
__global__ void __launch_bounds__(kThreads)
    matrix_kernel(const Segment segment, int64_t first, int64_t rows, T* __restrict__ out, bool vector) {
  constexpr int kCount = kVector / static_cast<int>(sizeof(T));  // elements of a store
  const int64_t chunks = ceil_div(segment.projected, kChunk), total = rows * chunks;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < total; p += stride) {
    const int64_t row = p / chunks, column = p % chunks * kChunk, q = first + row, block = q / segment.block;
    UnitElements<kSketch, T> unit;
    unit.begin(segment, block, column);
    T made[kChunk];
    unit.make(segment, q, q - block * segment.block, column, made);
#pragma unroll
    for (int part = 0; part < kChunk; part += kCount) {
      Pack<T, kCount> pack;
#pragma unroll
      for (int e = 0; e < kCount; ++e) pack.value[e] = made[part + e];
      store_columns(out + row * segment.projected, column + part, segment.projected, vector, pack);
    }
  }
}

template <int kSketch, typename T>
cudaError_t fill(const Segment& segment, int64_t first, int64_t rows, void* out, cudaStream_t stream) {
  const int64_t wanted = ceil_div(rows * ceil_div(segment.projected, kChunk), kThreads);
  const int64_t blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  const bool vector = aligned(out, segment.projected * int64_t{sizeof(T)}, kVector);
  matrix_kernel<kSketch, T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(segment, first, rows,
                                                                                    static_cast<T*>(out), vector);
  return cudaGetLastError();
}

template <typename T>
cudaError_t matrix(int sketch, const Segment& segment, int64_t first, int64_t rows, void* out, cudaStream_t stream) {
  switch (sketch) {
    case kGaussian: return fill<kGaussian, T>(segment, first, rows, out, stream);
    case kRademacher: return fill<kRademacher, T>(segment, first, rows, out, stream);
    case kSrht: return fill<kSrht, T>(segment, first, rows, out, stream);
    case kCount: return fill<kCount, T>(segment, first, rows, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t sketch_product(int sketch, const Rows& x, const Segment& segment, float scale, void* out, int dtype,
                           int device, cudaStream_t stream) {
  if (sketch == kCount) return count_sketch(x, segment, scale, out, dtype, stream);
  if (sketch == kRows) return row_sketch(x, segment, scale, out, dtype, stream);
  if (dtype == kFloat32) return float_sketch(sketch, x, segment, scale, out, stream);
  return tensor_sketch(sketch, x, segment, scale, out, dtype, device, stream);
}

}  // namespace
}  // namespace rmm
}  // namespace ds_efficient

extern "C" {

using namespace ds_efficient;

int ds_efficient_rmm_version() { return DS_EFFICIENT_RMM_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Each returns a cudaError_t; see rmm_common.h.

int ds_efficient_rmm_matrix(uint64_t key, int sketch, int64_t base_row, uint64_t before, int64_t block,
                            int64_t projected, const int64_t* chosen, int64_t first, int64_t rows, void* out,
                            int dtype, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || projected == 0) return error;
  const rmm::Segment segment{key, base_row, before, block, projected, chosen, 0, nullptr};
  switch (dtype) {
    case rmm::kFloat32: return rmm::matrix<float>(sketch, segment, first, rows, out, stream);
    case rmm::kBfloat16: return rmm::matrix<Bfloat16>(sketch, segment, first, rows, out, stream);
    case rmm::kFloat16: return rmm::matrix<Float16>(sketch, segment, first, rows, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

int ds_efficient_rmm_apply(const void* x, int64_t stride, int64_t features, uint64_t key, int sketch,
                           int64_t base_row, uint64_t before, int64_t block, int64_t projected, const int64_t* chosen,
                           int64_t blocks, double scale, void* out, int dtype, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || blocks == 0 || block == 0 || projected == 0 || features == 0) return error;
  const rmm::Segment segment{key, base_row, before, block, projected, chosen, blocks, nullptr};
  return rmm::sketch_product(sketch, rmm::Rows{x, stride, features}, segment, static_cast<float>(scale), out, dtype,
                             device, stream);
}

// The same with S given: `matrix` is (blocks * block, projected), contiguous, the unit elements of the whole segment.
int ds_efficient_rmm_product(const void* x, int64_t stride, int64_t features, const void* matrix, int64_t block,
                             int64_t projected, int64_t blocks, double scale, void* out, int dtype, int device,
                             cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || blocks == 0 || block == 0 || projected == 0 || features == 0) return error;
  const rmm::Segment segment{0, 0, 0, block, projected, nullptr, blocks, matrix};
  return rmm::sketch_product(rmm::kGiven, rmm::Rows{x, stride, features}, segment, static_cast<float>(scale), out,
                             dtype, device, stream);
}

}  // extern "C"
