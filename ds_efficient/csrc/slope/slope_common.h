// Index arithmetic of N:M sparse matrices, the same for host C++ and for CUDA kernels.
//
// Mask         (rows, columns) bits, packed: a row is ceil(columns / 32) little-endian 32-bit words, column j is bit
//              j % 32 of word j / 32, bits beyond the last column are 0. M divides 32, so that no group of M columns
//              straddles two words, and a full word of a forward mask has exactly 32 N / M bits.
// Compact      (rows, columns N / M) values: the kept ones of each row in ascending column order.
// 2:4 operand  two slots in every group of 4 consecutive elements of a row, in ascending order, (rows, columns / 2):
//              the kept positions, completed by the smallest other ones; a completed slot holds 0.
#pragma once

#include <cstdint>
#include <cstring>

#define DS_EFFICIENT_SLOPE_VERSION 1

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed masks are read as little-endian words"
#endif

#ifndef DS_EFFICIENT_HD
#if defined(__CUDACC__)
#define DS_EFFICIENT_HD __host__ __device__ __forceinline__
#else
#define DS_EFFICIENT_HD inline
#endif
#endif

namespace ds_efficient {
namespace slope {

constexpr int kWord = 32;   // columns of a mask word
constexpr int kGroup = 4;   // elements of a group of the 2:4 operand
constexpr int kSlots = 2;   // of these with a slot
constexpr int kVector = 16; // bytes of the widest load and store

template <int kBytes>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
  using key = int32_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
  using key = int32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
  using key = int64_t;
};

DS_EFFICIENT_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DS_EFFICIENT_HD int64_t words_of(int64_t columns) { return ceil_div(columns, kWord); }

// Values of a full mask word.
DS_EFFICIENT_HD int values_per_word(int n, int m) { return kWord / m * n; }

struct Matrix {
  int64_t rows, columns, words, kept;  // kept: values of a row
  int per_word;                        // values of a mask word
};

DS_EFFICIENT_HD Matrix matrix_of(int64_t rows, int64_t columns, int n, int m) {
  return Matrix{rows, columns, words_of(columns), columns / m * n, values_per_word(n, m)};
}

DS_EFFICIENT_HD int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The lowest `count` bits; 0 <= count <= 32.
DS_EFFICIENT_HD uint32_t low_bits(int count) { return count >= kWord ? ~0u : (1u << count) - 1u; }

// Which of `count` bits from column `column` on exist in a row of `columns`: 0 <= column < columns, 1 <= count <= 32.
DS_EFFICIENT_HD uint32_t existing_bits(int64_t column, int64_t columns, int count) {
  const int64_t left = columns - column;
  return low_bits(left < count ? static_cast<int>(left) : count);
}

// Place of bit `bit` of a mask word among the values of that word.
DS_EFFICIENT_HD int place_in_word(uint32_t word, int bit) { return count_bits(word & low_bits(bit)); }

// The slots of a group of 4 as a mask, from its kept positions (at most 2).
DS_EFFICIENT_HD uint32_t complete_slots(uint32_t kept) {
  if ((kept & (kept - 1u)) != 0u) return kept;    // two
  if (kept == 0u) return 3u;                      // none: 0 and 1
  return kept == 1u ? 3u : (kept | 1u);           // one: with 0, or 0 with 1
}

// The two slots of a group: push its kept values in ascending order, then finish. A lone value stands in the second
// slot, behind the completing position 0, unless it stands at position 0 itself.
template <typename T>
struct SlotPair {
  T first, second;
};

template <typename T>
DS_EFFICIENT_HD void push(SlotPair<T>& pair, T value) {
  pair.first = pair.second;
  pair.second = value;
}

template <typename T>
DS_EFFICIENT_HD void finish(SlotPair<T>& pair, uint32_t kept) {
  if (kept == 1u) {
    pair.first = pair.second;
    pair.second = 0;
  }
}

// Order of magnitudes: the bits of |x| as a number (NaN is the largest), never negative.
template <typename T>
DS_EFFICIENT_HD typename Unsigned<sizeof(T)>::key magnitude(T bits) {
  return static_cast<typename Unsigned<sizeof(T)>::key>(bits & static_cast<T>(static_cast<T>(~T{0}) >> 1));
}

// Whether compact rows are operand rows as they stand.
DS_EFFICIENT_HD bool compact_is_operand(int n, int m) { return (n == 1 && m == 2) || (n == 2 && m == 4); }

// ---- tile of the kernel that makes the transposed operand ------------------------------------------------------

constexpr int kTileOutputs = 128, kTileInputs = 128;          // of the matrix (outputs, inputs)
constexpr int kTileWords = kTileInputs / kWord;               // mask words of a row of the tile
constexpr int kTileRow = kTileOutputs / kGroup * kSlots;      // slots of an input feature in the tile
constexpr int kTileThreads = 256, kTileWarps = kTileThreads / 32;
constexpr int kTilePasses = kTileOutputs / kGroup * kTileWords / kTileWarps;  // (group, word) pairs of a warp

// The finished tile lies in shared memory as kTileInputs rows of 16-byte chunks; the chunks of a row change places by
// row, so that neither 8 rows of one chunk nor 8 chunks of one row meet in a bank.
template <int kBytes>
DS_EFFICIENT_HD int tile_chunk(int row, int chunk) {
  return row * (kTileRow * kBytes / kVector) + (chunk ^ (row & 7));
}

// Tiles of the rows of the operand from `first_input` on: the first mask word, and how many lie side by side.
struct TileGrid {
  int64_t first_word;
  uint32_t across;
};

DS_EFFICIENT_HD TileGrid tile_grid(int64_t first_input, int64_t inputs) {
  const int64_t first_word = first_input / kTileInputs * kTileWords;
  return TileGrid{first_word, static_cast<uint32_t>(ceil_div(first_input + inputs - first_word * kWord, kTileInputs))};
}

}  // namespace slope
}  // namespace ds_efficient
