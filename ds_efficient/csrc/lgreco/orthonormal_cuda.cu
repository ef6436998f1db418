// Orthonormal columns on CUDA devices; C ABI, no torch headers. See orthonormal_common.h.
//
// One launch for up to kGroup matrices: a block of threads takes a matrix through all passes, the largest first. G and
// R^-1 stay in shared memory; the rows come from the L2 cache, tile by tile, the next while one is worked on. Matrices
// of more than kSplitRows rows are cut into pieces, one a block, with a launch for each of G, R^-1 and P R^-1, twice; a
// last launch has a block a matrix for those in which a column is dependent or a number not finite, which are rare.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "orthonormal_common.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int kThreads = 512;
constexpr int kTileSize = 3 * kThreads;        // numbers of a tile
constexpr int kMostSlices = 32;                // of a tile's rows: their sums are added one after the other
constexpr int kPitch = kMostColumns + 1;       // of G, so that columns do not fall into one bank
constexpr int kPart = kMostColumns * kPitch;   // numbers of a G
constexpr int kGroup = 128;                    // matrices of a launch

struct Matrix {
  float* data;
  int32_t rows, columns;
  int32_t first_piece, pieces;  // of all pieces of the group
};

struct Group {
  Matrix matrix[kGroup];
};

struct Memory {
  double* g;         // kMostColumns * kPitch
  double* diagonal;  // kMostColumns
  double* tile;      // kTileSize
};

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

// work(first row, rows, width of a row in the tile) with the rows of the matrix in the tile, columns filled up with
// zeros to a multiple of four. All threads call it; `work` may write the rows that it is given.
template <typename Work>
__device__ __forceinline__ void for_tiles(const Matrix& matrix, double* tile, Work work) {
  const int thread = static_cast<int>(threadIdx.x), r = matrix.columns;
  const int width = (r + 3) / 4 * 4, rows = kTileSize / width;
  const int64_t all = static_cast<int64_t>(matrix.rows) * r;
  float next[3];
  for (int i = 0; i < 3; ++i) {
    tile[thread + i * kThreads] = 0.0;
    const int e = thread + i * kThreads;
    next[i] = e < rows * r && e < all ? matrix.data[e] : 0.0f;
  }
  for (int first = 0; first < matrix.rows; first += rows) {
    const int count = matrix.rows - first < rows ? matrix.rows - first : rows;
    const int64_t after = static_cast<int64_t>(first + count) * r;
    __syncthreads();
    for (int i = 0; i < 3; ++i) {
      const int e = thread + i * kThreads;
      if (e < rows * r) {
        tile[e / r * width + e % r] = static_cast<double>(next[i]);
        next[i] = after + e < all ? matrix.data[after + e] : 0.0f;
      }
    }
    __syncthreads();
    work(first, count, width);
  }
  __syncthreads();
}

// The upper triangle of P^T P, zeros below. Threads have 4 x 4 blocks of it for some of the rows of each tile.
__device__ __forceinline__ void multiply(const Matrix& matrix, const Memory& memory) {
  const int thread = static_cast<int>(threadIdx.x), r = matrix.columns;
  const int side = (r + 3) / 4, blocks = side * (side + 1) / 2;
  const int slices = min_of(kThreads / blocks, min_of(kMostSlices, matrix.rows));
  const int slice = thread / blocks;
  int row = 0, column = thread % blocks;
  while (column >= side - row) {
    column -= side - row;
    ++row;
  }
  column += row;
  double sum[4][4] = {};
  for_tiles(matrix, memory.tile, [&](int, int count, int width) {
    if (slice >= slices) return;
    for (int i = slice; i < count; i += slices) {
      const double* const a = memory.tile + i * width + 4 * row;
      const double* const b = memory.tile + i * width + 4 * column;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
#pragma unroll
        for (int y = 0; y < 4; ++y) sum[x][y] += a[x] * b[y];
      }
    }
  });
  for (int i = thread; i < kPart; i += kThreads) memory.g[i] = 0.0;
  __syncthreads();
  for (int turn = 0; turn < slices; ++turn) {
    if (slice == turn) {
      for (int x = 0; x < 4; ++x) {
        for (int y = 0; y < 4; ++y) {
          if (4 * row + x <= 4 * column + y) memory.g[(4 * row + x) * kPitch + 4 * column + y] += sum[x][y];
        }
      }
    }
    __syncthreads();
  }
}

// G becomes R; columns that depend on those before get a row of zeros. Bit j of the result: column j does.
__device__ __forceinline__ uint64_t factorize(int r, const Memory& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  double* const g = memory.g;
  if (thread < r) memory.diagonal[thread] = g[thread * kPitch + thread];
  __syncthreads();
  uint64_t dependent = 0;
  for (int j = 0; j < r; ++j) {
    const double left = g[j * kPitch + j];
    const bool none = !(left > kDependent * memory.diagonal[j]);
    const double root = none ? 0.0 : sqrt(left), factor = none ? 0.0 : 1.0 / root;
    if (none) dependent |= uint64_t{1} << j;
    __syncthreads();
    if (thread == j) g[j * kPitch + j] = root;
    if (thread > j && thread < r) g[j * kPitch + thread] *= factor;
    __syncthreads();
    const int others = r - 1 - j;
    for (int i = thread; i < others * others; i += kThreads) {
      const int row = j + 1 + i / others, column = j + 1 + i % others;
      if (column >= row) g[row * kPitch + column] -= g[j * kPitch + row] * g[j * kPitch + column];
    }
    __syncthreads();
  }
  return dependent;
}

// R becomes its inverse, in which the columns of rows of zeros are zeros.
__device__ __forceinline__ void invert(int r, double* g) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int j = 0; j < r; ++j) {
    const double pivot = g[j * kPitch + j], factor = pivot > 0.0 ? 1.0 / pivot : 0.0;
    double sum = 0.0;
    if (thread < j) {
      for (int k = thread; k < j; ++k) sum += g[thread * kPitch + k] * g[k * kPitch + j];
    }
    __syncthreads();
    if (thread < j) g[thread * kPitch + j] = -sum * factor;
    if (thread == j) g[j * kPitch + j] = factor;
    __syncthreads();
  }
}

// P <- P R^-1.
__device__ __forceinline__ void apply(const Matrix& matrix, const Memory& memory) {
  const int r = matrix.columns, side = (r + 3) / 4;
  for_tiles(matrix, memory.tile, [&](int first, int count, int width) {
    for (int task = static_cast<int>(threadIdx.x); task < count * side; task += kThreads) {
      const int row = task / side, column = task % side * 4;
      const int end = column + 4 < r ? column + 4 : r;
      double sum[4] = {};
      for (int k = 0; k < end; ++k) {
        const double a = memory.tile[row * width + k];
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[c] += a * memory.g[k * kPitch + column + c];
      }
      float* const to = matrix.data + static_cast<int64_t>(first + row) * r + column;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (column + c < r) to[c] = static_cast<float>(sum[c]);
      }
    }
  });
}

__device__ __forceinline__ double squares_of_row(const Matrix& matrix, int row) {
  const float* const from = matrix.data + static_cast<int64_t>(row) * matrix.columns;
  double sum = 0.0;
  for (int k = 0; k < matrix.columns; ++k) sum += static_cast<double>(from[k]) * static_cast<double>(from[k]);
  return sum;
}

// Replaces column j, which is zero.
__device__ __forceinline__ void complete(const Matrix& matrix, int j, const Memory& memory) {
  const int thread = static_cast<int>(threadIdx.x), r = matrix.columns;
  double* const least = memory.tile;
  double* const place = memory.tile + kThreads;  // rows, exact in float64
  double mine = 2.0, where = 0.0;
  for (int row = thread; row < matrix.rows; row += kThreads) {
    const double sum = squares_of_row(matrix, row);
    if (sum < mine) {
      mine = sum;
      where = row;
    }
  }
  least[thread] = mine;
  place[thread] = where;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      const double sum = least[thread + half], other = place[thread + half];
      if (sum < least[thread] || (sum == least[thread] && other < place[thread])) {
        least[thread] = sum;
        place[thread] = other;
      }
    }
    __syncthreads();
  }
  const int row = static_cast<int>(place[0]);
  const double norm = sqrt(1.0 - least[0]);
  __syncthreads();
  if (thread < r) memory.tile[thread] = static_cast<double>(matrix.data[static_cast<int64_t>(row) * r + thread]);
  __syncthreads();
  for (int i = thread; i < matrix.rows; i += kThreads) {
    float* const at = matrix.data + static_cast<int64_t>(i) * r;
    double value = i == row ? 1.0 : 0.0;
    for (int k = 0; k < r; ++k) value -= static_cast<double>(at[k]) * memory.tile[k];
    at[j] = static_cast<float>(value / norm);
  }
  __syncthreads();
}

__device__ __forceinline__ bool has_finite_diagonal(const double* g, int r) {
  bool finite = true;
  for (int j = 0; j < r; ++j) finite = finite && is_finite(g[j * kPitch + j]);
  return finite;
}

// `undone`: null, or not 0 for the matrices that are to be done.
__global__ void __launch_bounds__(kThreads) orthonormalize_kernel(const Group group, const double* undone) {
  __shared__ double g[kPart], diagonal[kMostColumns], tile[kTileSize];
  if (undone && undone[blockIdx.x] == 0.0) return;
  const Matrix matrix = group.matrix[blockIdx.x];
  const Memory memory{g, diagonal, tile};
  const int r = matrix.columns;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    multiply(matrix, memory);
    if (!has_finite_diagonal(g, r)) {  // the same for all threads
      const int64_t all = static_cast<int64_t>(matrix.rows) * r;
      for (int64_t i = threadIdx.x; i < all; i += kThreads) matrix.data[i] = keyed::float_of(0x7fc00000);
      return;
    }
    __syncthreads();
    uint64_t dependent = factorize(r, memory);
    invert(r, g);
    apply(matrix, memory);
    if (dependent == 0 && pass > 0) return;
    for (int j = 0; j < r; ++j) {
      if (dependent >> j & 1) complete(matrix, j, memory);
    }
  }
}

// ---- matrices of many rows -----------------------------------------------------------------------------------------

// What the kernels leave each other: G of each piece, R^-1 of each matrix, and whether it is left to the last kernel.
struct Scratch {
  double* parts;
  double* inverses;
  double* undone;
};

__device__ __forceinline__ int matrix_of(const Group& group, int piece) {
  int found = 0;
  while (piece >= group.matrix[found].first_piece + group.matrix[found].pieces) ++found;
  return found;
}

__device__ __forceinline__ Matrix part_of(const Matrix& matrix, int piece) {
  const int first = (piece - matrix.first_piece) * kPieceRows, left = matrix.rows - first;
  return Matrix{matrix.data + static_cast<int64_t>(first) * matrix.columns, min_of(left, kPieceRows), matrix.columns, 0,
                0};
}

__device__ __forceinline__ void copy_part(double* to, const double* from) {
  for (int i = static_cast<int>(threadIdx.x); i < kPart; i += kThreads) to[i] = from[i];
}

__global__ void __launch_bounds__(kThreads) products_kernel(const Group group, const Scratch scratch) {
  __shared__ double g[kPart], tile[kTileSize];
  const int piece = static_cast<int>(blockIdx.x), index = matrix_of(group, piece);
  multiply(part_of(group.matrix[index], piece), Memory{g, nullptr, tile});
  copy_part(scratch.parts + static_cast<int64_t>(piece) * kPart, g);
}

__global__ void __launch_bounds__(kThreads) factors_kernel(const Group group, const Scratch scratch, bool first_pass) {
  __shared__ double g[kPart], diagonal[kMostColumns];
  const int index = static_cast<int>(blockIdx.x);
  if (!first_pass && scratch.undone[index] != 0.0) return;
  const Matrix matrix = group.matrix[index];
  for (int i = static_cast<int>(threadIdx.x); i < kPart; i += kThreads) {
    double sum = 0.0;
    for (int p = 0; p < matrix.pieces; ++p) sum += scratch.parts[static_cast<int64_t>(matrix.first_piece + p) * kPart + i];
    g[i] = sum;
  }
  __syncthreads();
  const bool finite = has_finite_diagonal(g, matrix.columns);
  __syncthreads();
  const uint64_t dependent = factorize(matrix.columns, Memory{g, diagonal, nullptr});
  if (threadIdx.x == 0) scratch.undone[index] = finite && dependent == 0 ? 0.0 : 1.0;
  invert(matrix.columns, g);
  copy_part(scratch.inverses + static_cast<int64_t>(index) * kPart, g);
}

__global__ void __launch_bounds__(kThreads) apply_kernel(const Group group, const Scratch scratch) {
  __shared__ double g[kPart], tile[kTileSize];
  const int piece = static_cast<int>(blockIdx.x), index = matrix_of(group, piece);
  if (scratch.undone[index] != 0.0) return;
  copy_part(g, scratch.inverses + static_cast<int64_t>(index) * kPart);
  apply(part_of(group.matrix[index], piece), Memory{g, nullptr, tile});
}

// ---- launches ------------------------------------------------------------------------------------------------------

cudaError_t run_whole(const Group& group, int count, cudaStream_t stream) {
  orthonormalize_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(group, nullptr);
  return cudaGetLastError();
}

cudaError_t run_split(Group& group, int count, double* memory, cudaStream_t stream) {
  int pieces = 0;
  for (int i = 0; i < count; ++i) {
    Matrix& matrix = group.matrix[i];
    matrix.first_piece = pieces;
    matrix.pieces = (matrix.rows + kPieceRows - 1) / kPieceRows;
    pieces += matrix.pieces;
  }
  double* const inverses = memory + static_cast<int64_t>(pieces) * kPart;
  const Scratch scratch{memory, inverses, inverses + static_cast<int64_t>(count) * kPart};
  const unsigned matrices = static_cast<unsigned>(count), blocks = static_cast<unsigned>(pieces);
  for (int pass = 0; pass < 2; ++pass) {
    products_kernel<<<blocks, kThreads, 0, stream>>>(group, scratch);
    factors_kernel<<<matrices, kThreads, 0, stream>>>(group, scratch, pass == 0);
    apply_kernel<<<blocks, kThreads, 0, stream>>>(group, scratch);
  }
  orthonormalize_kernel<<<matrices, kThreads, 0, stream>>>(group, scratch.undone);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_orthonormal_version() { return DS_EFFICIENT_LGRECO_ORTHONORMAL_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ds_efficient_lgreco_orthonormalize(void* const* matrices, const int64_t* rows, const int64_t* columns,
                                       int64_t count, double* scratch, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  std::vector<Matrix> kinds[2];  // whole ones, split ones
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = columns[i] >= 1 && columns[i] <= kMostColumns && rows[i] >= columns[i];
    const bool split = rows[i] > kSplitRows;
    if (!fits || rows[i] >= int64_t{1} << 30 || (split && !scratch)) return cudaErrorInvalidValue;
    kinds[split].push_back(Matrix{static_cast<float*>(matrices[i]), static_cast<int32_t>(rows[i]),
                                  static_cast<int32_t>(columns[i]), 0, 0});
  }
  for (std::vector<Matrix>& kind : kinds) {
    std::stable_sort(kind.begin(), kind.end(), [](const Matrix& a, const Matrix& b) {
      return int64_t{a.rows} * a.columns * a.columns > int64_t{b.rows} * b.columns * b.columns;
    });
    for (size_t first = 0; first < kind.size(); first += kGroup) {
      const int some = static_cast<int>(std::min<size_t>(kGroup, kind.size() - first));
      Group group{};
      std::copy_n(kind.begin() + static_cast<std::ptrdiff_t>(first), some, group.matrix);
      const cudaError_t launched =
          &kind == kinds ? run_whole(group, some, stream) : run_split(group, some, scratch, stream);
      if (launched != cudaSuccess) return launched;
    }
  }
  return cudaSuccess;
}

}  // extern "C"
