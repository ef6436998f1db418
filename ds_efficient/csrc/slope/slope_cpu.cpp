// N:M sparse matrices on the CPU; C ABI, no torch headers. See slope_common.h for the formats.
#if defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"
#include "slope_common.h"

namespace {

using namespace ds_efficient::slope;
using ds_efficient::run_parallel;

constexpr int64_t kPerThread = 1 << 16;  // fewer elements than this are not worth a thread

// 16 bytes, on which compilers do & and casts as on numbers.
typedef uint8_t Bytes __attribute__((vector_size(kVector)));

// Byte i of the result is byte index[i] of x, or 0 where index[i] is 0x80.
inline Bytes shuffle(Bytes x, Bytes index) {
#if defined(__SSSE3__)
  return (Bytes)_mm_shuffle_epi8((__m128i)x, (__m128i)index);
#elif defined(__aarch64__)
  return vqtbl1q_u8(x, index);
#else
  Bytes result;
  for (int i = 0; i < kVector; ++i) result[i] = index[i] & 0x80 ? 0 : x[index[i]];
  return result;
#endif
}

template <typename T>
inline Bytes load(const T* from, int64_t available) {
  Bytes x = {};
  if (available >= kVector / static_cast<int64_t>(sizeof(T))) {
    std::memcpy(&x, from, kVector);
  } else {
    std::memcpy(&x, from, static_cast<size_t>(available) * sizeof(T));
  }
  return x;
}

// For each mask of a chunk of 16 bytes: byte indices that spread its values to the kept elements, that pack the kept
// elements together, and ones at the kept elements.
template <typename T>
struct Tables {
  static constexpr int kPer = kVector / static_cast<int>(sizeof(T)), kMasks = 1 << kPer;
  alignas(kVector) uint8_t spread[kMasks][kVector], pack[kMasks][kVector], keep[kMasks][kVector];

  Tables() {
    constexpr int kSize = static_cast<int>(sizeof(T));
    std::memset(spread, 0x80, sizeof spread);
    std::memset(pack, 0x80, sizeof pack);
    std::memset(keep, 0, sizeof keep);
    for (int mask = 0; mask < kMasks; ++mask) {
      int place = 0;
      for (int e = 0; e < kPer; ++e) {
        if (!(mask >> e & 1)) continue;
        for (int b = 0; b < kSize; ++b) {
          spread[mask][e * kSize + b] = static_cast<uint8_t>(place * kSize + b);
          pack[mask][place * kSize + b] = static_cast<uint8_t>(e * kSize + b);
          keep[mask][e * kSize + b] = 0xff;
        }
        ++place;
      }
    }
  }

  static const Tables& get() {
    static const Tables tables;
    return tables;
  }
};

inline Bytes row_of(const uint8_t* table_row) {
  Bytes x;
  std::memcpy(&x, table_row, kVector);
  return x;
}

// Rows of a matrix shared among threads.
template <typename Work>
void for_rows(const Matrix& shape, int threads, Work work) {
  run_parallel(shape.rows, kPerThread / std::max<int64_t>(1, shape.columns) + 1, threads, work);
}

// The dense elements of a mask word, at most `count`; `available` values can be read at `values`.
template <typename T>
inline void spread_word(const Tables<T>& tables, const T* values, int64_t available, uint32_t word, uint32_t used,
                        T* dense, int count) {
  constexpr int kPer = Tables<T>::kPer;
  for (int shift = 0; shift < count; shift += kPer) {
    const uint32_t bits = word >> shift & low_bits(kPer);
    const int place = place_in_word(word, shift);
    Bytes x = shuffle(load(values + place, available - place), row_of(tables.spread[bits]));
    x &= row_of(tables.keep[used >> shift & low_bits(kPer)]);
    std::memcpy(dense + shift, &x, sizeof(T) * static_cast<size_t>(std::min(kPer, count - shift)));
  }
}

template <typename T>
void decompress(const T* values, const uint32_t* forward, const uint32_t* backward, T* dense, const Matrix& shape,
                int threads) {
  const Tables<T>& tables = Tables<T>::get();
  for_rows(shape, threads, [=, &tables](int64_t begin, int64_t rows) {
    for (int64_t row = begin; row < begin + rows; ++row) {
      const uint32_t* const mask = forward + row * shape.words;
      const uint32_t* const used = backward == nullptr ? mask : backward + row * shape.words;
      const int64_t whole = shape.columns / kWord;
      for (int64_t w = 0; w < shape.words; ++w) {
        const int64_t first = row * shape.kept + w * shape.per_word;
        T* const target = dense + row * shape.columns + w * kWord;
        const int64_t available = shape.rows * shape.kept - first;
        if (w < whole && available >= kWord) {  // the common case, with all sizes known to the compiler
          spread_word(tables, values + first, kWord, mask[w], used[w] & mask[w], target, kWord);
        } else {
          const int count = static_cast<int>(std::min<int64_t>(kWord, shape.columns - w * kWord));
          spread_word(tables, values + first, available, mask[w], used[w] & mask[w], target, count);
        }
      }
    }
  });
}

template <typename T>
void compress(const T* dense, const uint32_t* forward, T* values, const Matrix& shape, int threads) {
  constexpr int kPer = Tables<T>::kPer;
  const Tables<T>& tables = Tables<T>::get();
  for_rows(shape, threads, [=, &tables](int64_t begin, int64_t rows) {
    const T* const end = values + (begin + rows) * shape.kept;  // of what this thread may overwrite
    for (int64_t row = begin; row < begin + rows; ++row) {
      for (int64_t w = 0; w < shape.words; ++w) {
        const int64_t column = w * kWord;
        const int count = static_cast<int>(std::min<int64_t>(kWord, shape.columns - column));
        const uint32_t word = forward[row * shape.words + w] & low_bits(count);
        const T* const source = dense + row * shape.columns + column;
        T* const target = values + row * shape.kept + w * shape.per_word;
        for (int shift = 0; shift < count; shift += kPer) {
          const uint32_t bits = word >> shift & low_bits(kPer);
          const Bytes x = shuffle(load(source + shift, count - shift), row_of(tables.pack[bits]));
          T* const to = target + place_in_word(word, shift);
          // Whole vectors where the next ones of this thread overwrite what is too much.
          std::memcpy(to, &x, end - to >= kPer ? kVector : sizeof(T) * static_cast<size_t>(count_bits(bits)));
        }
      }
    }
  });
}

// ---- column pass -----------------------------------------------------------------------------------------------

// One mask word of a group of m rows: Key has the size of T.
template <typename T, typename Key>
void select_word(const Tables<T>& tables, const T* values, const uint32_t* forward, uint32_t* backward,
                 const Matrix& shape, int64_t row, int64_t w, int n, int m) {
  Key key[kWord][kWord], before[kWord][kWord];
  const int count = static_cast<int>(std::min<int64_t>(kWord, shape.columns - w * kWord));
  for (int r = 0; r < m; ++r) {
    const int64_t first = (row + r) * shape.kept + w * shape.per_word;
    const uint32_t word = forward[(row + r) * shape.words + w] & low_bits(count);
    T dense[kWord];
    spread_word(tables, values + first, shape.rows * shape.kept - first, word, word, dense, kWord);
    for (int j = 0; j < kWord; ++j) {
      key[r][j] = word >> j & 1u ? static_cast<Key>(magnitude(dense[j])) : static_cast<Key>(-1);
      before[r][j] = 0;
    }
  }
  for (int r = 0; r < m; ++r) {
    for (int s = r + 1; s < m; ++s) {
      for (int j = 0; j < kWord; ++j) {
        before[s][j] += key[r][j] >= key[s][j];
        before[r][j] += key[s][j] > key[r][j];
      }
    }
  }
  for (int r = 0; r < m; ++r) {
    uint8_t chosen[kWord];
    for (int j = 0; j < kWord; ++j) chosen[j] = key[r][j] >= 0 && before[r][j] < n;
    uint32_t word = 0;
    for (int b = 0; b < kWord / 8; ++b) {
      uint64_t eight;
      std::memcpy(&eight, chosen + 8 * b, sizeof eight);
      word |= static_cast<uint32_t>(eight * 0x0102040810204080ull >> 56) << (8 * b);  // byte i to bit i
    }
    backward[(row + r) * shape.words + w] = word;
  }
}

template <typename T, typename Key>
void select(const T* values, const uint32_t* forward, uint32_t* backward, const Matrix& shape, int n, int m,
            int threads) {
  const Tables<T>& tables = Tables<T>::get();
  const int64_t grain = kPerThread / std::max<int64_t>(1, shape.columns * m) + 1;
  run_parallel(shape.rows / m, grain, threads, [=, &tables](int64_t begin, int64_t groups) {
    for (int64_t group = begin; group < begin + groups; ++group) {
      for (int64_t w = 0; w < shape.words; ++w) {
        select_word<T, Key>(tables, values, forward, backward, shape, group * m, w, n, m);
      }
    }
  });
}

// ---- operands of the 2:4 sparse products -----------------------------------------------------------------------

template <typename T>
void forward_operand(const T* values, const uint32_t* forward, T* out, int64_t columns, int64_t first_row,
                     int64_t rows, int n, int m, int threads) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  for_rows(shape, threads, [=](int64_t begin, int64_t count) {
    if (compact_is_operand(n, m)) {
      std::memcpy(out + begin * shape.kept, values + (first_row + begin) * shape.kept,
                  static_cast<size_t>(count * shape.kept) * sizeof(T));
      return;
    }
    for (int64_t row = begin; row < begin + count; ++row) {
      const uint32_t* const mask = forward + (first_row + row) * shape.words;
      const T* next = values + (first_row + row) * shape.kept;
      T* target = out + row * (columns / kGroup * kSlots);
      for (int64_t column = 0; column < columns; column += kGroup, target += kSlots) {
        const uint32_t kept = mask[column / kWord] >> (column % kWord) & 15u;
        SlotPair<T> pair{0, 0};
        for (int j = 0; j < count_bits(kept); ++j) push(pair, *next++);
        finish(pair, kept);
        target[0] = pair.first;
        target[1] = pair.second;
      }
    }
  });
}

constexpr int kBlock = 64;  // outputs that are transposed at a time

// Slots of the 32 input features of mask word `w` in `groups` groups of outputs from `output` on.
template <typename T>
void transpose_word(const T* values, const uint32_t* forward, const uint32_t* backward, const Matrix& shape,
                    int64_t output, int groups, int64_t w, T (&slots)[kWord][kBlock / kGroup * kSlots]) {
  for (int g = 0; g < groups; ++g) {
    uint32_t all[kGroup], used[kGroup];
    const T* source[kGroup];
    for (int j = 0; j < kGroup; ++j) {
      const int64_t row = output + g * kGroup + j;
      all[j] = forward[row * shape.words + w];
      used[j] = backward[row * shape.words + w] & all[j];
      source[j] = values + row * shape.kept + w * shape.per_word;
    }
    for (int bit = 0; bit < kWord; ++bit) {
      SlotPair<T> pair{0, 0};
      uint32_t kept = 0;
      for (int j = 0; j < kGroup; ++j) {
        if (used[j] >> bit & 1u) {
          kept |= 1u << j;
          push(pair, source[j][place_in_word(all[j], bit)]);
        }
      }
      finish(pair, kept);
      slots[bit][kSlots * g] = pair.first;
      slots[bit][kSlots * g + 1] = pair.second;
    }
  }
}

template <typename T>
void backward_operand(const T* values, const uint32_t* forward, const uint32_t* backward, T* out, const Matrix& shape,
                      int64_t first_row, int64_t rows, int threads) {
  const int64_t first_word = first_row / kWord, end = first_row + rows, pitch = shape.rows / kGroup * kSlots;
  const int64_t grain = kPerThread / (kWord * shape.rows) + 1;
  run_parallel(words_of(end) - first_word, grain, threads, [=](int64_t begin, int64_t count) {
    T slots[kWord][kBlock / kGroup * kSlots];
    for (int64_t w = first_word + begin; w < first_word + begin + count; ++w) {
      for (int64_t output = 0; output < shape.rows; output += kBlock) {
        const int groups = static_cast<int>(std::min<int64_t>(kBlock, shape.rows - output)) / kGroup;
        transpose_word(values, forward, backward, shape, output, groups, w, slots);
        const int64_t low = std::max(first_row, w * kWord), high = std::min(end, (w + 1) * kWord);
        for (int64_t input = low; input < high; ++input) {
          std::memcpy(out + (input - first_row) * pitch + output / kGroup * kSlots, slots[input % kWord],
                      sizeof(T) * static_cast<size_t>(groups * kSlots));
        }
      }
    }
  });
}

template <typename T>
void pattern(const uint32_t* mask, T* out, int64_t rows, int64_t columns, bool transposed, T one, int threads) {
  const int64_t words = words_of(columns), lines = transposed ? columns : rows;
  const int64_t length = transposed ? rows : columns;
  run_parallel(lines, kPerThread / std::max<int64_t>(1, length) + 1, threads, [=](int64_t begin, int64_t count) {
    for (int64_t line = begin; line < begin + count; ++line) {
      for (int64_t start = 0; start < length; start += kGroup) {
        uint32_t kept = 0;
        for (int j = 0; j < kGroup; ++j) {
          const int64_t row = transposed ? start + j : line, column = transposed ? line : start + j;
          kept |= (mask[row * words + column / kWord] >> (column % kWord) & 1u) << j;
        }
        const uint32_t slots = complete_slots(kept);
        for (int j = 0; j < kGroup; ++j) out[line * length + start + j] = slots >> j & 1u ? one : T{0};
      }
    }
  });
}

}  // namespace

extern "C" {

int ds_efficient_slope_version() { return DS_EFFICIENT_SLOPE_VERSION; }

// Each returns 0, or 1 for an unknown size of an element. Arguments as in slope_cuda.cu and slope_operands.cu.
int ds_efficient_slope_decompress(const void* values, const uint32_t* forward, const uint32_t* backward, void* dense,
                                  int64_t rows, int64_t columns, int n, int m, int size, int threads) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    decompress(static_cast<const T*>(values), forward, backward, static_cast<T*>(dense), shape, threads);
    return 0;
  };
  return size == 2 ? run(uint16_t{0}) : size == 4 ? run(uint32_t{0}) : size == 8 ? run(uint64_t{0}) : 1;
}

int ds_efficient_slope_compress(const void* dense, const uint32_t* forward, void* values, int64_t rows,
                                int64_t columns, int n, int m, int size, int threads) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    compress(static_cast<const T*>(dense), forward, static_cast<T*>(values), shape, threads);
    return 0;
  };
  return size == 2 ? run(uint16_t{0}) : size == 4 ? run(uint32_t{0}) : size == 8 ? run(uint64_t{0}) : 1;
}

int ds_efficient_slope_select(const void* values, const uint32_t* forward, uint32_t* backward, int64_t rows,
                              int64_t columns, int n, int m, int size, int threads) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  if (size == 2) {
    select<uint16_t, int16_t>(static_cast<const uint16_t*>(values), forward, backward, shape, n, m, threads);
  } else if (size == 4) {
    select<uint32_t, int32_t>(static_cast<const uint32_t*>(values), forward, backward, shape, n, m, threads);
  } else if (size == 8) {
    select<uint64_t, int64_t>(static_cast<const uint64_t*>(values), forward, backward, shape, n, m, threads);
  } else {
    return 1;
  }
  return 0;
}

int ds_efficient_slope_forward_operand(const void* values, const uint32_t* forward, void* out, int64_t columns,
                                       int64_t first_row, int64_t rows, int n, int m, int size, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward_operand(static_cast<const T*>(values), forward, static_cast<T*>(out), columns, first_row, rows, n, m,
                    threads);
    return 0;
  };
  return size == 2 ? run(uint16_t{0}) : size == 4 ? run(uint32_t{0}) : 1;
}

int ds_efficient_slope_backward_operand(const void* values, const uint32_t* forward, const uint32_t* backward,
                                        void* out, int64_t outputs, int64_t inputs, int64_t first_row, int64_t rows,
                                        int n, int m, int size, int threads) {
  if (rows == 0 || outputs == 0) return 0;
  const Matrix shape = matrix_of(outputs, inputs, n, m);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward_operand(static_cast<const T*>(values), forward, backward, static_cast<T*>(out), shape, first_row, rows,
                     threads);
    return 0;
  };
  return size == 2 ? run(uint16_t{0}) : size == 4 ? run(uint32_t{0}) : 1;
}

int ds_efficient_slope_pattern(const uint32_t* mask, void* out, int64_t rows, int64_t columns, int transposed,
                               uint32_t one, int size, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    pattern(mask, static_cast<T*>(out), rows, columns, transposed != 0, static_cast<T>(one), threads);
    return 0;
  };
  return size == 2 ? run(uint16_t{0}) : size == 4 ? run(uint32_t{0}) : 1;
}

}  // extern "C"
