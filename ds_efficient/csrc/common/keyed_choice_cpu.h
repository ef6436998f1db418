// The choice of k of n on the host. See keyed_random.h for the order of the elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "keyed_random.h"

namespace ds_efficient {
namespace keyed {

// The indices of the k smallest rank words of one row, ascending; equal words in index order.
inline void choose_row(uint64_t key, uint64_t row, int64_t n, int64_t k, int64_t* out, std::vector<uint64_t>& rank,
                       std::vector<uint64_t>& scratch) {
  for (int64_t j = 0; j < n; j += 2) {
    const Block block = rank_words(key, row, static_cast<uint32_t>(j / 2));
    rank[j] = rank_word(block, 0);
    if (j + 1 < n) rank[j + 1] = rank_word(block, 1);
  }
  scratch = rank;
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end());
  const uint64_t threshold = scratch[k - 1];
  int64_t below = 0;
  for (int64_t j = 0; j < n; ++j) below += rank[j] < threshold;
  int64_t ties = k - below, found = 0;
  for (int64_t j = 0; j < n && found < k; ++j) {
    if (rank[j] < threshold || (rank[j] == threshold && ties-- > 0)) out[found++] = j;
  }
}

}  // namespace keyed
}  // namespace ds_efficient
