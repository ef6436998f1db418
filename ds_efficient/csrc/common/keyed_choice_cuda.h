// The choice of k of n on CUDA devices: one block of threads a row. See keyed_random.h for the order of the elements.
#pragma once

#include <cstdint>

#include "keyed_random.h"

namespace ds_efficient {
namespace keyed {

constexpr int kRowThreads = 512, kRowWarps = kRowThreads / 32;  // of the block that works on a row
constexpr int kDigit = 11, kBins = 1 << kDigit;  // 6 digits cover 64 bits; the last has 9
constexpr int kCandidates = 256;

// Exclusive sum over the block of one number a thread; `total` is the sum of all. All threads must call it.
__device__ __forceinline__ uint32_t block_scan(uint32_t value, uint32_t* warp_sum, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sum[warp] = sum;
  __syncthreads();
  uint32_t before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kRowWarps; ++i) {
    if (i < warp) before += warp_sum[i];
    all += warp_sum[i];
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

struct RowShared {
  uint32_t histogram[kBins];
  uint64_t value[kCandidates];
  uint32_t index[kCandidates];
  uint32_t warp_sum[kRowWarps];
  uint32_t digit, rank, population, num_candidates;
  uint64_t threshold;
  uint32_t last_index;
};

// Call visit(element, rank word) for all elements of the row that this thread owns.
template <typename Visit>
__device__ __forceinline__ void for_each_element(uint64_t key, uint64_t row, uint32_t n, Visit visit) {
  const uint32_t pairs = (n + 1) / 2;
  for (uint32_t pair = threadIdx.x; pair < pairs; pair += kRowThreads) {
    const Block block = rank_words(key, row, pair);
    visit(2 * pair, rank_word(block, 0));
    if (2 * pair + 1 < n) visit(2 * pair + 1, rank_word(block, 1));
  }
}

// Find the element of rank `rank` (1 = smallest) in the order (rank word, index): radix selection digit by digit until
// so few share the leading digits that they are ranked by counting. Leaves it in shared threshold, last_index.
__device__ __forceinline__ void find_threshold(uint64_t key, uint64_t row, uint32_t n, uint32_t rank,
                                               RowShared& shared) {
  uint64_t prefix = 0;
  int shift = 64;
  uint32_t population = n;
  while (population > kCandidates && shift > 0) {
    const int width = shift < kDigit ? shift : kDigit;
    const int low = shift - width;
    for (int bin = threadIdx.x; bin < kBins; bin += kRowThreads) shared.histogram[bin] = 0;
    __syncthreads();
    for_each_element(key, row, n, [&](uint32_t, uint64_t value) {
      const bool mine = shift == 64 || (value >> shift) == prefix;
      if (mine) atomicAdd(&shared.histogram[(value >> low) & ((1u << width) - 1)], 1u);
    });
    __syncthreads();
    constexpr int kShare = kBins / kRowThreads;
    uint32_t count[kShare], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kShare; ++i) sum += count[i] = shared.histogram[threadIdx.x * kShare + i];
    uint32_t before = block_scan(sum, shared.warp_sum, &total);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (before < rank && rank <= before + count[i]) {
        shared.digit = threadIdx.x * kShare + i;
        shared.rank = rank - before;
        shared.population = count[i];
      }
      before += count[i];
    }
    __syncthreads();
    prefix = (prefix << width) | shared.digit;
    rank = shared.rank;
    population = shared.population;
    shift = low;
    __syncthreads();
  }
  if (population > kCandidates) {  // more than 256 equal 64-bit words: the smallest indices win
    if (threadIdx.x == 0) {
      shared.threshold = prefix;
      for (uint32_t j = 0; rank > 0; ++j) {
        if (rank_word(rank_words(key, row, j / 2), j % 2) == prefix && --rank == 0) shared.last_index = j;
      }
    }
    __syncthreads();
    return;
  }
  if (threadIdx.x == 0) shared.num_candidates = 0;
  __syncthreads();
  for_each_element(key, row, n, [&](uint32_t j, uint64_t value) {
    if (shift == 64 || (value >> shift) == prefix) {
      const uint32_t slot = atomicAdd(&shared.num_candidates, 1u);
      shared.value[slot] = value;
      shared.index[slot] = j;
    }
  });
  __syncthreads();
  if (threadIdx.x < population) {
    const uint64_t value = shared.value[threadIdx.x];
    const uint32_t index = shared.index[threadIdx.x];
    uint32_t smaller = 0;
    for (uint32_t i = 0; i < population; ++i) {
      smaller += shared.value[i] < value || (shared.value[i] == value && shared.index[i] < index);
    }
    if (smaller + 1 == rank) {
      shared.threshold = value;
      shared.last_index = index;
    }
  }
  __syncthreads();
}

// Write the k smallest of n elements of a row to target, ascending. All kRowThreads threads of a block call it; they
// may call it again for another row.
__device__ __forceinline__ void choose_row(uint64_t key, uint64_t row, uint32_t n, uint32_t k, int64_t* target,
                                           RowShared& shared) {
  find_threshold(key, row, n, k, shared);
  const uint64_t threshold = shared.threshold;
  const uint32_t last_index = shared.last_index;
  const auto chosen = [&](uint32_t j, uint64_t value) {
    return j < n && (value < threshold || (value == threshold && j <= last_index));
  };
  uint32_t base = 0;
  const uint32_t pairs = (n + 1) / 2;
  for (uint32_t start = 0; start < pairs; start += kRowThreads) {  // ascending, a block of pairs at a time
    const uint32_t pair = start + threadIdx.x;
    bool even = false, odd = false;
    if (pair < pairs) {
      const Block block = rank_words(key, row, pair);
      even = chosen(2 * pair, rank_word(block, 0));
      odd = chosen(2 * pair + 1, rank_word(block, 1));
    }
    uint32_t total;
    uint32_t slot = base + block_scan(static_cast<uint32_t>(even) + odd, shared.warp_sum, &total);
    if (even) target[slot++] = 2 * static_cast<int64_t>(pair);
    if (odd) target[slot] = 2 * static_cast<int64_t>(pair) + 1;
    base += total;
  }
  __syncthreads();
}

}  // namespace keyed
}  // namespace ds_efficient
