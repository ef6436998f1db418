// N:M sparse matrices on CUDA devices: between compact and dense, and the column pass. C ABI, no torch headers; see
// slope_common.h for the formats.
#include "slope_cuda.h"

namespace {

using namespace ds_efficient::slope;

// ---- decompress, compress --------------------------------------------------------------------------------------
// A lane takes 16 bytes of a dense row at a time; a warp takes 32 of these chunks of one row, several times.

constexpr int kUnroll = 4, kPackUnroll = 2;  // chunks that a lane has in flight: decompress, compress

template <typename T>
int64_t stretches_of(const Matrix& shape, int unroll) {
  return ceil_div(shape.columns, int64_t{32} * kPerVector<T> * unroll);
}

// Mask bits of the chunk that starts at `column`, and the index of its first value in the row.
template <typename T>
__device__ __forceinline__ uint32_t chunk_bits(const uint32_t* __restrict__ mask_row, int64_t column,
                                               const Matrix& shape, int64_t* first) {
  const uint32_t word = __ldg(mask_row + column / kWord);
  const int shift = static_cast<int>(column % kWord);
  if (first != nullptr) *first = column / kWord * shape.per_word + place_in_word(word, shift);
  return (word >> shift) & existing_bits(column, shape.columns, kPerVector<T>);
}

// kHalf: every chunk has exactly half its elements kept and all rows are aligned, so that the values of a chunk are
// one load or store of 8 bytes.
template <typename T, bool kHalf>
__global__ void __launch_bounds__(kThreads)
    decompress_kernel(const T* __restrict__ values, const uint32_t* __restrict__ forward,
                      const uint32_t* __restrict__ backward, T* __restrict__ dense, Matrix shape, uint32_t across,
                      bool vector_dense) {
  constexpr int kPer = kPerVector<T>;
  using Chunk = Pack<T, kPer>;
  using Half = Pack<T, kPer / 2>;
  const Place place = place_of_warp(across);
  const int64_t row = place.row, start = (place.stretch * kUnroll * 32 + threadIdx.x % 32) * kPer;
  if (row >= shape.rows) return;
  const uint32_t* const forward_row = forward + row * shape.words;
  const T* const value_row = values + row * shape.kept;
  T* const dense_row = dense + row * shape.columns;
  const uint32_t* const used_row = backward == nullptr ? forward_row : backward + row * shape.words;
  uint32_t bits[kUnroll], used[kUnroll];
  Half half[kUnroll];
  int64_t first[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {  // no branches, so that all loads are under way together
    int64_t column = start + int64_t{u} * 32 * kPer;
    if (column >= shape.columns) column = 0;
    bits[u] = chunk_bits<T>(forward_row, column, shape, &first[u]);
    used[u] = bits[u] & chunk_bits<T>(used_row, column, shape, nullptr);
    if (kHalf) half[u] = load_pack<Half>(value_row + column / 2);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t column = start + int64_t{u} * 32 * kPer;
    if (column >= shape.columns) continue;
    Chunk chunk;
    if (kHalf) {
      uint64_t rest;
      memcpy(&rest, &half[u], sizeof rest);
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        chunk.value[e] = (used[u] >> e) & 1u ? static_cast<T>(rest) : T{0};
        if (sizeof(T) < 8 && ((bits[u] >> e) & 1u)) rest >>= 8 * sizeof(T) % 64;
      }
    } else {
      int64_t next = first[u];
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        chunk.value[e] = (used[u] >> e) & 1u ? __ldg(value_row + next) : T{0};
        next += (bits[u] >> e) & 1u;
      }
    }
    if (kHalf || (vector_dense && column + kPer <= shape.columns)) {
      store_pack_global(dense_row + column, chunk);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        if (column + e < shape.columns) dense_row[column + e] = chunk.value[e];
      }
    }
  }
}

template <typename T, bool kHalf>
__global__ void __launch_bounds__(kThreads)
    compress_kernel(const T* __restrict__ dense, const uint32_t* __restrict__ forward, T* __restrict__ values,
                    Matrix shape, uint32_t across, bool vector_dense) {
  constexpr int kPer = kPerVector<T>;
  using Chunk = Pack<T, kPer>;
  using Half = Pack<T, kPer / 2>;
  const Place place = place_of_warp(across);
  const int64_t row = place.row, start = (place.stretch * kPackUnroll * 32 + threadIdx.x % 32) * kPer;
  if (row >= shape.rows) return;
  const uint32_t* const forward_row = forward + row * shape.words;
  const T* const dense_row = dense + row * shape.columns;
  T* const value_row = values + row * shape.kept;
  uint32_t bits[kPackUnroll];
  Chunk chunk[kPackUnroll];
  int64_t first[kPackUnroll];
#pragma unroll
  for (int u = 0; u < kPackUnroll; ++u) {  // no branches in the common case, so that all loads are under way together
    int64_t column = start + int64_t{u} * 32 * kPer;
    if (column >= shape.columns) column = 0;
    bits[u] = chunk_bits<T>(forward_row, column, shape, &first[u]);
    if (kHalf || (vector_dense && column + kPer <= shape.columns)) {
      chunk[u] = load_pack<Chunk>(dense_row + column);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        chunk[u].value[e] = (bits[u] >> e) & 1u ? __ldg(dense_row + column + e) : T{0};
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kPackUnroll; ++u) {
    const int64_t column = start + int64_t{u} * 32 * kPer;
    if (column >= shape.columns) continue;
    if (kHalf) {
      uint64_t made = 0;
#pragma unroll
      for (int e = kPer - 1; e >= 0; --e) {
        if ((bits[u] >> e) & 1u) made = (sizeof(T) < 8 ? made << 8 * sizeof(T) % 64 : 0) | chunk[u].value[e];
      }
      Half half;
      memcpy(&half, &made, sizeof half);
      store_pack_global(value_row + column / 2, half);
    } else {
      int64_t next = first[u];
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        if ((bits[u] >> e) & 1u) value_row[next++] = chunk[u].value[e];
      }
    }
  }
}

// Whether every 16 bytes of a dense row keep 8, with all of these aligned.
template <typename T>
bool halves(const Matrix& shape, int n, int m, const void* dense, const void* values) {
  return 2 * n == m && m <= kPerVector<T> && aligned(dense, shape.columns * int64_t{sizeof(T)}, kVector) &&
         aligned(values, shape.kept * int64_t{sizeof(T)}, kVector / 2);
}

template <typename T>
cudaError_t decompress(const void* values, const uint32_t* forward, const uint32_t* backward, void* dense,
                       int64_t rows, int64_t columns, int n, int m, cudaStream_t stream) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  const int64_t across = stretches_of<T>(shape, kUnroll);
  if (blocks_of(rows, across) > kMostBlocks) return cudaErrorInvalidConfiguration;
  const bool vector = aligned(dense, columns * int64_t{sizeof(T)}, kVector);
  const auto kernel = halves<T>(shape, n, m, dense, values) ? decompress_kernel<T, true> : decompress_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks_of(rows, across)), kThreads, 0, stream>>>(
      static_cast<const T*>(values), forward, backward, static_cast<T*>(dense), shape, static_cast<uint32_t>(across),
      vector);
  return cudaGetLastError();
}

template <typename T>
cudaError_t compress(const void* dense, const uint32_t* forward, void* values, int64_t rows, int64_t columns, int n,
                     int m, cudaStream_t stream) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  const int64_t across = stretches_of<T>(shape, kPackUnroll);
  if (blocks_of(rows, across) > kMostBlocks) return cudaErrorInvalidConfiguration;
  const bool vector = aligned(dense, columns * int64_t{sizeof(T)}, kVector);
  const auto kernel = halves<T>(shape, n, m, dense, values) ? compress_kernel<T, true> : compress_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks_of(rows, across)), kThreads, 0, stream>>>(
      static_cast<const T*>(dense), forward, static_cast<T*>(values), shape, static_cast<uint32_t>(across), vector);
  return cudaGetLastError();
}

// ---- column pass -----------------------------------------------------------------------------------------------
// A warp takes a mask word of kM consecutive rows, a lane one column of it.

template <typename T, int kM>
__global__ void __launch_bounds__(kThreads, 1)
    select_kernel(const T* __restrict__ values, const uint32_t* __restrict__ forward, uint32_t* __restrict__ backward,
                  Matrix shape, uint32_t across, int n) {
  using Key = typename Unsigned<sizeof(T)>::key;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t{blockIdx.x / across} * kM;
  const int64_t word = int64_t{blockIdx.x % across} * kWarps + threadIdx.x / 32;
  if (word >= shape.words) return;  // the whole warp
  const uint32_t exists = existing_bits(word * kWord, shape.columns, kWord);
  // Without branches, so that all loads are under way together: a pruned element reads the first value of its word.
  const auto load_key = [&](int r) -> Key {
    const uint32_t bits = __ldg(forward + (row + r) * shape.words + word) & exists;
    const bool kept = (bits >> lane) & 1u;
    const T* const first = values + (row + r) * shape.kept + word * shape.per_word;
    const Key key = magnitude(__ldg(first + (kept ? place_in_word(bits, lane) : 0)));
    return kept ? key : Key{-1};
  };
  Key key[kM];
#pragma unroll
  for (int r = 0; r < kM; ++r) key[r] = load_key(r);
  constexpr bool kSmall = kM <= 8;  // for large groups, half a thousand comparisons or more: a loop, not unrolled
#pragma unroll kSmall ? kM : 1
  for (int r = 0; r < kM; ++r) {
    const Key mine = kSmall ? key[r] : load_key(r);
    int before = 0;  // values of the column that come first in the order (magnitude, index)
#pragma unroll
    for (int s = 0; s < kM; ++s) before += s < r ? key[s] >= mine : key[s] > mine;
    const uint32_t chosen = __ballot_sync(0xffffffffu, mine >= 0 && before < n);
    if (lane == r) backward[(row + r) * shape.words + word] = chosen;
  }
}

template <typename T, int kM>
cudaError_t launch_select(const void* values, const uint32_t* forward, uint32_t* backward, const Matrix& shape, int n,
                          cudaStream_t stream) {
  const int64_t across = ceil_div(shape.words, kWarps), blocks = across * (shape.rows / kM);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  select_kernel<T, kM><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const T*>(values), forward, backward, shape, static_cast<uint32_t>(across), n);
  return cudaGetLastError();
}

template <typename T>
cudaError_t select(const void* values, const uint32_t* forward, uint32_t* backward, int64_t rows, int64_t columns,
                   int n, int m, cudaStream_t stream) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  switch (m) {
    case 2: return launch_select<T, 2>(values, forward, backward, shape, n, stream);
    case 4: return launch_select<T, 4>(values, forward, backward, shape, n, stream);
    case 8: return launch_select<T, 8>(values, forward, backward, shape, n, stream);
    case 16: return launch_select<T, 16>(values, forward, backward, shape, n, stream);
    case 32: return launch_select<T, 32>(values, forward, backward, shape, n, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" {

int ds_efficient_slope_version() { return DS_EFFICIENT_SLOPE_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Each returns a cudaError_t. Matrices are (rows, columns) with n of every m columns kept; `size` is the number of
// bytes of an element; forward masks hold exactly n of every m, backward masks are subsets of them.

// backward may be null.
int ds_efficient_slope_decompress(const void* values, const uint32_t* forward, const uint32_t* backward, void* dense,
                                  int64_t rows, int64_t columns, int n, int m, int size, int device,
                                  cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || columns == 0) return error;
  switch (size) {
    case 2: return decompress<uint16_t>(values, forward, backward, dense, rows, columns, n, m, stream);
    case 4: return decompress<uint32_t>(values, forward, backward, dense, rows, columns, n, m, stream);
    case 8: return decompress<unsigned long long>(values, forward, backward, dense, rows, columns, n, m, stream);
    default: return cudaErrorInvalidValue;
  }
}

int ds_efficient_slope_compress(const void* dense, const uint32_t* forward, void* values, int64_t rows,
                                int64_t columns, int n, int m, int size, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || columns == 0) return error;
  switch (size) {
    case 2: return compress<uint16_t>(dense, forward, values, rows, columns, n, m, stream);
    case 4: return compress<uint32_t>(dense, forward, values, rows, columns, n, m, stream);
    case 8: return compress<unsigned long long>(dense, forward, values, rows, columns, n, m, stream);
    default: return cudaErrorInvalidValue;
  }
}

// rows is a multiple of m.
int ds_efficient_slope_select(const void* values, const uint32_t* forward, uint32_t* backward, int64_t rows,
                              int64_t columns, int n, int m, int size, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || columns == 0) return error;
  switch (size) {
    case 2: return select<uint16_t>(values, forward, backward, rows, columns, n, m, stream);
    case 4: return select<uint32_t>(values, forward, backward, rows, columns, n, m, stream);
    case 8: return select<unsigned long long>(values, forward, backward, rows, columns, n, m, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
