// Orthonormal columns on the CPU; C ABI, no torch headers. See orthonormal_common.h.
//
// Sums over the rows are taken in pieces of kPiece rows, which threads share, and added in their order: the bits do not
// depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

#include "low_rank_cpu.h"
#include "orthonormal_common.h"
#include "parallel.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int64_t kPiece = 512;

struct Matrix {
  float* data;
  int64_t rows, columns;
  int threads;

  float* row(int64_t i) const { return data + i * columns; }
  int64_t pieces() const { return (rows + kPiece - 1) / kPiece; }
};

// work<kWidth>() with the number of columns filled up to a power of two, so that loops over them have a fixed length.
template <typename Work>
void with_width(int64_t columns, Work work) {
  if (columns <= 8) work(std::integral_constant<int, 8>());
  else if (columns <= 16) work(std::integral_constant<int, 16>());
  else if (columns <= 32) work(std::integral_constant<int, 32>());
  else work(std::integral_constant<int, 64>());
}

// Adds the products of rows first .. end - 1 to `sum`, kWidth x kWidth.
template <int kWidth>
void add_products(const Matrix& matrix, int64_t first, int64_t end, double* sum) {
  const int64_t r = matrix.columns;
  double row[4][kWidth] = {};
  for (int64_t i = first; i < end; i += 4) {
    for (int64_t u = 0; u < 4; ++u) {
      for (int64_t k = 0; k < r; ++k) row[u][k] = i + u < end ? static_cast<double>(matrix.row(i + u)[k]) : 0.0;
    }
    for (int64_t j = 0; j < r; ++j) {
      double* const to = sum + j * kWidth;
      for (int k = 0; k < kWidth; ++k) {
        to[k] += row[0][j] * row[0][k] + row[1][j] * row[1][k] + (row[2][j] * row[2][k] + row[3][j] * row[3][k]);
      }
    }
  }
}

// P^T P, row by row of `columns`.
std::vector<double> multiply(const Matrix& matrix) {
  const int64_t r = matrix.columns;
  std::vector<double> g(static_cast<size_t>(r * r));
  with_width(r, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    constexpr int64_t kSize = int64_t{kWidth} * kWidth;
    std::vector<double> parts(static_cast<size_t>(matrix.pieces() * kSize));
    double* const all = parts.data();
    ds_efficient::run_parallel(matrix.pieces(), 4, matrix.threads, [=](int64_t first, int64_t some) {
      for (int64_t piece = first; piece < first + some; ++piece) {
        const int64_t end = std::min(matrix.rows, (piece + 1) * kPiece);
        add_products<kWidth>(matrix, piece * kPiece, end, all + piece * kSize);
      }
    });
    for (int64_t piece = 0; piece < matrix.pieces(); ++piece) {
      for (int64_t j = 0; j < r; ++j) {
        for (int64_t k = 0; k < r; ++k) g[static_cast<size_t>(j * r + k)] += all[piece * kSize + j * kWidth + k];
      }
    }
  });
  return g;
}

// G becomes R^-1; bit j of the result: column j depends on those before, and its column is zero.
uint64_t invert_root(double* g, int64_t r) {
  double diagonal[kMostColumns];
  for (int64_t j = 0; j < r; ++j) diagonal[j] = g[j * r + j];
  uint64_t dependent = 0;
  for (int64_t j = 0; j < r; ++j) {
    const double left = g[j * r + j];
    const bool none = !(left > kDependent * diagonal[j]);
    const double root = none ? 0.0 : std::sqrt(left), factor = none ? 0.0 : 1.0 / root;
    if (none) dependent |= uint64_t{1} << j;
    g[j * r + j] = root;
    for (int64_t k = j + 1; k < r; ++k) g[j * r + k] *= factor;
    for (int64_t i = j + 1; i < r; ++i) {
      for (int64_t k = i; k < r; ++k) g[i * r + k] -= g[j * r + i] * g[j * r + k];
    }
  }
  for (int64_t j = 0; j < r; ++j) {
    const double pivot = g[j * r + j], factor = pivot > 0.0 ? 1.0 / pivot : 0.0;
    for (int64_t i = 0; i < j; ++i) {
      double sum = 0.0;
      for (int64_t k = i; k < j; ++k) sum += g[i * r + k] * g[k * r + j];
      g[i * r + j] = -sum * factor;
    }
    g[j * r + j] = factor;
  }
  return dependent;
}

// P <- P R^-1, with the upper triangle of `inverse`.
void apply(const Matrix& matrix, const double* inverse) {
  const int64_t r = matrix.columns;
  with_width(r, [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    std::vector<double> padded(static_cast<size_t>(r * kWidth));
    for (int64_t j = 0; j < r; ++j) {
      for (int64_t k = j; k < r; ++k) padded[static_cast<size_t>(j * kWidth + k)] = inverse[j * r + k];
    }
    const double* const factors = padded.data();
    ds_efficient::run_parallel(matrix.rows, 4 * kPiece, matrix.threads, [=](int64_t first, int64_t some) {
      for (int64_t i = first; i < first + some; ++i) {
        float* const row = matrix.row(i);
        double sum[kWidth] = {};
        for (int64_t k = 0; k < r; ++k) {
          const double factor = static_cast<double>(row[k]);
          for (int c = 0; c < kWidth; ++c) sum[c] += factor * factors[k * kWidth + c];
        }
        for (int64_t c = 0; c < r; ++c) row[c] = static_cast<float>(sum[c]);
      }
    });
  });
}

// Replaces column j, which is zero.
void complete(const Matrix& matrix, int64_t j) {
  const int64_t r = matrix.columns;
  double least = 2.0, of_place[kMostColumns];
  int64_t place = 0;
  for (int64_t i = 0; i < matrix.rows; ++i) {
    double sum = 0.0;
    for (int64_t k = 0; k < r; ++k) sum += static_cast<double>(matrix.row(i)[k]) * static_cast<double>(matrix.row(i)[k]);
    if (sum < least) {
      least = sum;
      place = i;
    }
  }
  for (int64_t k = 0; k < r; ++k) of_place[k] = static_cast<double>(matrix.row(place)[k]);
  const double norm = std::sqrt(1.0 - least);
  for (int64_t i = 0; i < matrix.rows; ++i) {
    double value = i == place ? 1.0 : 0.0;
    for (int64_t k = 0; k < r; ++k) value -= static_cast<double>(matrix.row(i)[k]) * of_place[k];
    matrix.row(i)[j] = static_cast<float>(value / norm);
  }
}

void orthonormalize(const Matrix& matrix) {
  const int64_t r = matrix.columns;
  for (int pass = 0; pass < kMostPasses; ++pass) {
    std::vector<double> g = multiply(matrix);
    for (int64_t j = 0; j < r; ++j) {
      if (is_finite(g[static_cast<size_t>(j * r + j)])) continue;
      std::fill(matrix.data, matrix.data + matrix.rows * r, keyed::float_of(0x7fc00000));
      return;
    }
    const uint64_t dependent = invert_root(g.data(), r);
    apply(matrix, g.data());
    if (dependent == 0 && pass > 0) return;
    for (int64_t j = 0; j < r; ++j) {
      if (dependent >> j & 1) complete(matrix, j);
    }
  }
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_orthonormal_version() { return DS_EFFICIENT_LGRECO_ORTHONORMAL_VERSION; }

int ds_efficient_lgreco_orthonormalize(void* const* matrices, const int64_t* rows, const int64_t* columns,
                                       int64_t count, int threads) {
  for (int64_t i = 0; i < count; ++i) {
    if (columns[i] < 1 || columns[i] > kMostColumns || rows[i] < columns[i]) return kUnknown;
  }
  try {
    for (int64_t i = 0; i < count; ++i) {
      orthonormalize(Matrix{static_cast<float*>(matrices[i]), rows[i], columns[i], threads});
    }
    return kDone;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

int ds_efficient_lgreco_project(const void* x, const float* error, double unscale, const float* q, int64_t n, int64_t m,
                                int64_t r, float* next, float* p, int dtype, int threads) {
  if (r < 1 || r > kMostRank) return kUnknown;
  try {
    return with_element(Project{x, error, static_cast<float>(unscale), q, n, m, r, next, p, threads}, dtype);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

int ds_efficient_lgreco_project_back(const float* x, const float* p, int64_t n, int64_t m, int64_t r, float* q,
                                     int threads) {
  if (r < 1 || r > kMostRank) return kUnknown;
  return ProjectBack{x, p, n, m, r, q, threads}.run();
}

int ds_efficient_lgreco_rebuild(const float* p, const float* q, int64_t n, int64_t m, int64_t r, float* error,
                                double scale, void* out, int dtype, int threads) {
  if (r < 1 || r > kMostRank) return kUnknown;
  return with_element(Rebuild{p, q, n, m, r, error, static_cast<float>(scale), out, threads}, dtype);
}

}  // extern "C"
