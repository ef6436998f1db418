// Random sketches S for S^T X: definition of every element from a 64-bit key, and the C ABI of the compiled code.
//
// The rows of X are cut into blocks; a *segment* is a run of equal blocks (all full blocks, or the ragged last one):
// blocks of `block` rows, each projected to `projected` = p rows. Row q of the segment (q = 0 is its first row) is
// global row i = base_row + q, row l = q % block of block j = q / block of the segment. S is zero outside the blocks.
// Element (l, c) of a block is `scale` times the *unit element* below:
//
//   gaussian    normal before + q * p + c of the stream, rounded to the dtype of X      scale 1 / sqrt(p)
//   rademacher  +1 or -1 by bit c % 32 of word before + q * ceil(p / 32) + c / 32       scale 1 / sqrt(p)
//   srht        d_i * (-1)^popcount(l & r_c): d_i by bit i % 32 of word i / 32, r_c the c-th chosen one of
//               0 .. n - 1, n = `padded_rows(block)`                                    scale 1 / sqrt(p)
//   count       d_i where c is the column of row i, else 0: both from word i            scale 1
//   rows        1 where row l is the c-th chosen one of 0 .. block - 1, else 0          scale sqrt(block / p)
//
// A set bit is -1. `before` is the number of normals (gaussian) or words (rademacher) that the segments before take
// in the stream, else 0. `chosen` (blocks of the segment, p) int64, ascending in each block, is the keyed choice of p
// of n (srht) or of `block` (rows) for the row numbers base_row / (rows of a full block) + j; words and choices of
// one key are independent, being different counters of Philox. So E[S S^T] = I for every sketch.
//
// ABI (extern "C"; the CPU functions end with `int threads` and return 0, 1 for arguments without code, 2 when memory
// runs out; the CUDA functions end with `int device, cudaStream_t stream` and return a cudaError_t; all matrices have
// elements of `dtype`; nothing is allocated on the device):
//
//   int ds_efficient_rmm_version()                              DS_EFFICIENT_RMM_VERSION
//
//   int ds_efficient_rmm_matrix(uint64_t key, const Units* units, const int64_t* chosen, void* out, ...)
//     out (rows, projected) of `units`, contiguous, aligned to 16 bytes: unit elements of its rows of the segment, each
//     of its own block. `chosen` only for srht (else null); sketch is not rows. dtype is not float64.
//
//   int ds_efficient_rmm_rows(const void* x, int64_t stride, int64_t features, int64_t block, int64_t projected,
//                             const int64_t* chosen, int64_t blocks, double scale, void* out, int dtype, ...)
//     out (blocks * projected, features) contiguous = S^T X of the segment for the sketch rows, `scale` included. x: row
//     0 of the segment; `stride` elements from row to row (>= features, or anything where there is one row), elements
//     of a row adjacent, any alignment of its elements. Products in float32 (float64 for float64), rounded once.
//     float64 only on the CPU.
//
//   int ds_efficient_rmm_hadamard(const void* x, int64_t stride, int64_t features, uint64_t key, int64_t base_row,
//                                 int64_t block, int64_t projected, const int64_t* chosen, int64_t blocks,
//                                 double scale, void* out, int dtype, ...)
//     The same for srht by the fast transform, sums likewise; on CUDA for padded_rows(block) <= kHadamardLimit.
//
//   int ds_efficient_rmm_apply(const void* x, int64_t stride, int64_t features, uint64_t key, int sketch,
//                              int64_t base_row, uint64_t before, int64_t block, int64_t projected,
//                              const int64_t* chosen, int64_t blocks, double scale, void* out, int dtype, ...)
//     Only on the CPU: the same for every other sketch, S made in pieces as it is used.
#pragma once

#include <cstdint>

#include "keyed_random.h"

#define DS_EFFICIENT_RMM_VERSION 1

namespace ds_efficient {
namespace rmm {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum Sketch { kGaussian = 0, kRademacher = 1, kSrht = 2, kCount = 3, kRows = 4 };

// Which unit elements to make: rows first .. first + rows - 1 of a segment. One structure, so that a caller who makes
// the same ones again with another key passes few arguments.
struct Units {
  int64_t sketch, dtype, base_row;
  uint64_t before;
  int64_t block, projected, first, rows;
};

constexpr int64_t kHadamardLimit = 16384;  // largest transform of the CUDA kernel

// Words of a row of signs.
DS_EFFICIENT_HD int64_t sign_words(int64_t projected) { return (projected + 31) / 32; }

// Power of two that holds a block: the length of its Hadamard transform.
DS_EFFICIENT_HD int64_t padded_rows(int64_t block) {
  int64_t n = 1;
  while (n < block) n *= 2;
  return n;
}

// One word of the stream; where neighbours are needed too, `keyed::words` gives four at once.
DS_EFFICIENT_HD uint32_t word_at(uint64_t key, uint64_t index) {
  const keyed::Block block = keyed::words(key, index / 4);
  return block.word[index % 4];
}

DS_EFFICIENT_HD bool negative_bit(uint32_t word, int64_t bit) { return (word >> (bit & 31)) & 1u; }

DS_EFFICIENT_HD int parity(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word) & 1;
#else
  return __builtin_parity(word);
#endif
}

// Column and sign of a row in the count sketch: the sign is bit 0, the other 31 bits are scaled to 0 .. p - 1. The
// sign alone makes E[S S^T] = I exact; the columns are uniform to 1 part in 2^31 / p.
DS_EFFICIENT_HD int64_t count_column(uint32_t word, int64_t projected) {
  return static_cast<int64_t>((static_cast<uint64_t>(word >> 1) * static_cast<uint64_t>(projected)) >> 31);
}
DS_EFFICIENT_HD bool count_negative(uint32_t word) { return word & 1u; }

// Sign of row l against chosen frequency r in the Hadamard matrix; both are below 2^31.
DS_EFFICIENT_HD bool hadamard_negative(int64_t row, int64_t frequency) {
  return parity(static_cast<uint32_t>(row) & static_cast<uint32_t>(frequency)) != 0;
}

}  // namespace rmm
}  // namespace ds_efficient
