// What the CPU code of the sketches is made of: the unit elements of S in panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "keyed_random_lanes.h"
#include "number_types_cpu.h"
#include "rmm_common.h"

namespace ds_efficient {
namespace rmm {

// ---- unit elements -----------------------------------------------------------------------------------------------

// A run of equal blocks, as the functions of the ABI describe it.
struct Segment {
  uint64_t key;
  int sketch;
  int64_t base_row;
  uint64_t before;
  int64_t block, projected;
  const int64_t* chosen;
};

constexpr int64_t kPanelColumns = 64;  // columns of S at a time: two words of signs
constexpr int64_t kPanelRows = 128;    // rows at a time

// Signs 0 .. 63 of a row from column `first` (a multiple of 64) on, a set bit is -1.
inline uint64_t rademacher_bits(const Segment& s, int64_t row, int64_t first) {
  const uint64_t index = s.before + static_cast<uint64_t>(row * sign_words(s.projected) + first / 32);
  const keyed::Block block = keyed::words(s.key, index / 4);
  const uint64_t low = block.word[index % 4];
  if (s.projected - first <= 32) return low;
  const uint64_t high = index % 4 == 3 ? keyed::words(s.key, index / 4 + 1).word[0] : block.word[index % 4 + 1];
  return low | high << 32;
}

inline uint64_t srht_bits(const Segment& s, int64_t row, int64_t first, int64_t columns) {
  const int64_t i = s.base_row + row, local = row % s.block;
  const uint64_t flip = negative_bit(word_at(s.key, static_cast<uint64_t>(i) / 32), i) ? ~uint64_t{0} : 0;
  const int64_t* const chosen = s.chosen + row / s.block * s.projected + first;
  uint64_t bits = 0;
  for (int64_t c = 0; c < columns; ++c) bits |= static_cast<uint64_t>(hadamard_negative(local, chosen[c])) << c;
  return bits ^ flip;
}

// panel[r * columns + c] = unit element (row + r, first + c); columns <= 64, rows <= 128, sketch is not rows.
template <typename Element>
void unit_panel(const Segment& s, int64_t row, int64_t rows, int64_t first, int64_t columns, float* panel) {
  if (s.sketch == kGaussian) {
    const auto convert = [](uint32_t word) { return Element::round(keyed::normal_from_word(word)); };
    const uint64_t start = s.before + static_cast<uint64_t>(row * s.projected + first);
    const bool whole = columns == s.projected;
    for (int64_t r = 0; r < (whole ? 1 : rows); ++r) {
      keyed::fill_range(s.key, start + static_cast<uint64_t>(r * s.projected), whole ? rows * columns : columns,
                        panel + r * columns, convert);
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* const target = panel + r * columns;
    if (s.sketch == kCount) {
      const uint32_t word = word_at(s.key, static_cast<uint64_t>(s.base_row + row + r));
      const int64_t column = count_column(word, s.projected) - first;
      std::fill(target, target + columns, 0.0f);
      if (column >= 0 && column < columns) target[column] = count_negative(word) ? -1.0f : 1.0f;
      continue;
    }
    const uint64_t bits =
        s.sketch == kRademacher ? rademacher_bits(s, row + r, first) : srht_bits(s, row + r, first, columns);
    for (int64_t c = 0; c < columns; ++c) target[c] = bits >> c & 1u ? -1.0f : 1.0f;
  }
}

}  // namespace rmm
}  // namespace ds_efficient
