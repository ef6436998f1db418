// The k largest entries on CUDA devices: what the kernels share, the sample and the candidates. See topk_cuda.cu.
#pragma once

#include "elements_cuda.h"
#include "topk_common.h"

namespace ds_efficient {
namespace lgreco {
namespace topk {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = static_cast<int>(kTile) / (4 * kThreads);  // of four elements a thread, in a tile

// What the kernels leave each other in the counters.
struct Shared {
  uint32_t sample[kSampleBins];
  uint32_t digits[kRounds][kDigitBins];
  uint32_t candidates;       // how many reached the bound, those beyond the capacity included
  uint32_t prefix[kRounds];  // the digits found up to each round
  uint32_t wanted[kRounds];  // how many of that prefix are still wanted
};
static_assert(sizeof(Shared) <= kCounters * sizeof(uint32_t), "counters are too few");

struct State {
  Shared* shared;
  uint32_t* value;     // candidates: their bits as they are stored
  uint32_t* index;     // and where they are
  uint32_t* first;     // of each tile: where its candidates begin
  uint32_t* count;     // and how many there are
  uint32_t* larger;    // of each tile: selected for their magnitude, in the tile; then in the tiles before it
  uint32_t* equal;     // as large as the k-th largest
  uint32_t n, k, capacity, tiles;

  // Whether the candidates hold all that is selected.
  __device__ __forceinline__ bool narrowed() const {
    return capacity > 0 && shared->candidates >= k && shared->candidates <= capacity;
  }
};

__device__ __forceinline__ uint32_t lanes_below() { return (1u << (threadIdx.x % 32)) - 1u; }

// Exclusive sum over the block of a number a thread. All kOf threads call it.
template <int kOf>
__device__ __forceinline__ uint32_t sum_before(uint32_t value, uint32_t (&warp_sums)[kOf / 32]) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  uint32_t sum = value;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= static_cast<int>(step)) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  uint32_t before = 0;
#pragma unroll
  for (int i = 0; i < kOf / 32; ++i) before += i < warp ? warp_sums[i] : 0u;
  __syncthreads();
  return before + sum - value;
}

struct Found {
  uint32_t bin, wanted;
};

// The highest bin such that it and those above hold `wanted` or more, and how many are wanted of this bin; bin 0 where
// all hold fewer. All threads of the block call it.
template <int kBins>
__device__ __forceinline__ Found find_bin(const uint32_t* histogram, uint32_t wanted) {
  constexpr int kShare = kBins / kThreads;
  __shared__ uint32_t warp_sums[kWarps];
  __shared__ Found found;
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kShare;
  uint32_t count[kShare], sum = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) sum += count[i] = histogram[top - i];
  if (threadIdx.x == 0) found = Found{0, 0};
  uint32_t before = sum_before<kThreads>(sum, warp_sums);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (before < wanted && wanted <= before + count[i]) {
      found = Found{static_cast<uint32_t>(top - i), wanted - before};
    }
    before += count[i];
  }
  __syncthreads();
  const Found made = found;
  __syncthreads();
  return made;
}

// ---- sample --------------------------------------------------------------------------------------------------------

template <typename Element>
struct Source {
  const typename Element::Stored* x;
  const float* error;  // null: none
  float* next;         // null: no feedback
  float unscale;

  __device__ __forceinline__ float at(int64_t i) const {
    const float value = Element::load(x[i]);
    return next ? corrected(value, unscale, error ? error[i] : kNoError) : value;
  }
};

template <typename Element>
__global__ void __launch_bounds__(kThreads) sample_kernel(const Source<Element> source, const State state, uint32_t samples) {
  __shared__ uint32_t histogram[kSampleBins];
  for (int i = static_cast<int>(threadIdx.x); i < kSampleBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const int64_t stride = state.n / samples;
  for (uint32_t j = blockIdx.x * kThreads + threadIdx.x; j < samples; j += gridDim.x * kThreads) {
    atomicAdd(&histogram[magnitude_of(source.at(sampled_place(j, stride))) >> kSampleShift], 1u);
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kSampleBins; i += kThreads) {
    if (histogram[i]) atomicAdd(&state.shared->sample[i], histogram[i]);
  }
}

// ---- candidates ----------------------------------------------------------------------------------------------------

// A thread's elements of a tile, row r from first + 4 * (r * kThreads + thread) on, as float32; what does not exist is
// 0. With feedback they are corrected and written to `next`.
template <typename Element, bool kFeedback>
__device__ __forceinline__ void load_tile(const Source<Element>& source, int64_t first, int64_t n, bool wide,
                                          uint32_t (&raw)[kRows][4], float (&value)[kRows][4]) {
  Four<typename Element::Stored> four[kRows];
  Four<uint32_t> error[kRows];
  const int64_t mine = first + 4 * static_cast<int64_t>(threadIdx.x);
  const uint32_t* const errors = reinterpret_cast<const uint32_t*>(source.error);
  const bool whole = wide && first + kTile <= n;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = mine + r * 4 * kThreads, left = n - at;
    if (whole) {
      four[r] = load_wide(source.x + at);
      if (kFeedback && errors) error[r] = load_wide(errors + at);
    } else if (left > 0) {
      const int valid = left < 4 ? static_cast<int>(left) : 4;
      four[r] = load_four(source.x + at, valid, wide);
      if (kFeedback && errors) error[r] = load_four(errors + at, valid, wide);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t at = mine + r * 4 * kThreads, left = n - at;
    Four<uint32_t> made;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[r][i] = 0.0f;
      raw[r][i] = 0;
      if (i >= left) continue;
      value[r][i] = Element::load(four[r].one[i]);
      raw[r][i] = four[r].one[i];
      if (kFeedback) {
        value[r][i] = corrected(value[r][i], source.unscale, errors ? __uint_as_float(error[r].one[i]) : kNoError);
        made.one[i] = raw[r][i] = static_cast<uint32_t>(keyed::bits_of(value[r][i]));
      }
    }
    if (kFeedback && left > 0) {
      store_four(reinterpret_cast<uint32_t*>(source.next) + at, left < 4 ? static_cast<int>(left) : 4, wide, made);
    }
  }
}

// Bit 4 * r + i: element i of row r of this thread is a candidate.
__device__ __forceinline__ uint32_t chosen_of(const float (&value)[kRows][4], uint32_t bound) {
  uint32_t chosen = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) chosen |= (magnitude_of(value[r][i]) >= bound ? 1u : 0u) << (4 * r + i);
  }
  return chosen;
}

// Copies what reaches the bound that the sample gives for `rank` (0: none), in the order of the elements of a tile, the
// tiles in any order. With feedback it writes the corrected elements.
template <typename Element, bool kFeedback>
__global__ void __launch_bounds__(kThreads, kFeedback ? 2 : 4)
    collect_kernel(const Source<Element> source, const State state, uint32_t rank, bool wide) {
  __shared__ uint32_t sums[kRows * kWarps], base;
  static_assert(kRows * kWarps == 32, "a warp adds up the counts of a tile");
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const uint32_t below = lanes_below();
  uint32_t bound = 0xffffffffu;
  if (rank) {
    bound = find_bin<kSampleBins>(state.shared->sample, rank).bin << kSampleShift;
    if (bound == 0) bound = 1;  // zeros are never candidates: where they are selected, all elements are looked at
  }
  for (uint32_t tile = blockIdx.x; tile < state.tiles; tile += gridDim.x) {
    float value[kRows][4];
    uint32_t raw[kRows][4], before[kRows];
    load_tile<Element, kFeedback>(source, tile * kTile, state.n, wide, raw, value);
    const uint32_t chosen = chosen_of(value, bound);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      before[r] = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t votes = __ballot_sync(0xffffffffu, (chosen >> (4 * r + i)) & 1u);
        before[r] += static_cast<uint32_t>(__popc(votes & below));
      }
      if (lane == 31) sums[r * kWarps + warp] = before[r] + static_cast<uint32_t>(__popc((chosen >> (4 * r)) & 15u));
    }
    __syncthreads();
    const uint32_t mine = sums[lane];
    uint32_t upto = mine;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= static_cast<int>(step)) upto += other;
    }
    if (threadIdx.x == 31) {
      base = upto ? atomicAdd(&state.shared->candidates, upto) : 0u;
      state.first[tile] = base;
      state.count[tile] = upto;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) before[r] += __shfl_sync(0xffffffffu, upto - mine, r * kWarps + warp);
    __syncthreads();
    const uint32_t start = base;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      uint32_t place = start + before[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!((chosen >> (4 * r + i)) & 1u)) continue;
        if (place < state.capacity) {
          state.value[place] = raw[r][i];
          state.index[place] = static_cast<uint32_t>(tile * kTile) +
                               static_cast<uint32_t>(4 * (r * kThreads + static_cast<int>(threadIdx.x)) + i);
        }
        ++place;
      }
    }
  }
}

}  // namespace topk
}  // namespace lgreco
}  // namespace ds_efficient
