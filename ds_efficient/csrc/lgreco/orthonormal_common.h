// Orthonormal columns for many thin matrices at once: the rule, and the C ABI of the compiled code.
//
// A matrix has n rows and r columns, n >= r, r <= kMostColumns, float32, row by row without gaps. Cholesky-QR in
// float64: G = P^T P; G = R^T R; P <- P R^-1, at least twice, so that what the first pass leaves, where columns are
// nearly dependent, is removed by the second. That is Gram-Schmidt's result: column j is what column j of P has beside
// the columns before it, normalised.
//
// Rank deficiency: a column of which less than 1e-6 of its norm is left is replaced, in order, by the unit vector e_i,
// made orthogonal to all others, of the row i with the smallest sum of squares over the columns that there are (of
// equal ones the first). That sum is below 1, so that there is always something left of e_i. Columns of zeros thus
// become those of the identity. A matrix with a number that is not finite becomes NaN.
//
// Sums of many rows are added in another order on the CPU and on CUDA: the bits differ, though not from call to call.
//
// ABI (extern "C"; the CPU function ends with `int threads` and returns 0, 1 for arguments without code, 2 where memory
// runs out; the CUDA function ends with `int device, cudaStream_t stream` and returns a cudaError_t).
//
//   int ds_efficient_lgreco_orthonormal_version()                DS_EFFICIENT_LGRECO_ORTHONORMAL_VERSION
//   int ds_efficient_lgreco_orthonormalize(void* const* matrices, const int64_t* rows, const int64_t* columns,
//                                          int64_t count, ...)
//     On CUDA `double* scratch` comes before the device: for the matrices of more than kSplitRows rows, if any, kPart
//     numbers for each piece of kPieceRows rows and kPart + 1 for each of these matrices.
#pragma once

#include <cstdint>

#include "keyed_random.h"

#define DS_EFFICIENT_LGRECO_ORTHONORMAL_VERSION 2

namespace ds_efficient {
namespace lgreco {

constexpr int kMostColumns = 64;
constexpr double kDependent = 1e-12;  // of a column's squared norm
constexpr int kPieceRows = 2048, kSplitRows = 2 * kPieceRows;
constexpr int kMostPasses = 4;        // two, and more where columns had to be replaced

DS_EFFICIENT_HD bool is_finite(double value) { return value - value == 0.0; }

}  // namespace lgreco
}  // namespace ds_efficient
