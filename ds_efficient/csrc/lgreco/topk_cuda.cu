// The k largest entries by magnitude on CUDA devices; C ABI, no torch headers. See topk_common.h.
//
// Memory is read once where few entries are kept: a sample bounds the k-th largest magnitude from below, one pass copies
// what reaches the bound (the candidates), and the digits of the k-th largest are found from histograms of these. Where
// the sample misleads, so that too few or too many reach the bound, the same kernels work on all elements instead: that
// is decided on the device, which the host does not wait for. Of 2^26 float32 elements at 1 % the passes after the first
// touch some 10 MB in the L2 cache. Eight launches, whatever n.
#include <cmath>

#include "topk_candidates.h"

namespace {

using namespace ds_efficient::lgreco;
using namespace ds_efficient::lgreco::topk;
namespace keyed = ds_efficient::keyed;

constexpr int64_t kSamples = 1 << 17;
constexpr int64_t kOfBlock = 8192;  // elements of a block that counts digits
constexpr int kScanThreads = 1024;

// ---- digits --------------------------------------------------------------------------------------------------------

// The digits before `round`, the last of them found now. Block 0 notes it for the kernels that follow.
__device__ __forceinline__ Found find_prefix(const State& state, int round) {
  Found found{0, state.k};
  if (round == 0) return found;
  uint32_t prefix = 0;
  if (round > 1) {
    prefix = state.shared->prefix[round - 2];
    found.wanted = state.shared->wanted[round - 2];
  }
  const uint32_t* const histogram = state.shared->digits[round - 1];
  const Found digit = round == 1 ? find_bin<2048>(histogram, found.wanted) : find_bin<1024>(histogram, found.wanted);
  found.bin = round == 1 ? digit.bin : prefix << 10 | digit.bin;
  found.wanted = digit.wanted;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    state.shared->prefix[round - 1] = found.bin;
    state.shared->wanted[round - 1] = found.wanted;
  }
  return found;
}

// Counts digit `round` of the elements, or candidates, whose digits before are those of the k-th largest.
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    digits_kernel(const typename Element::Stored* x, const State state, int round) {
  using Stored = typename Element::Stored;
  __shared__ uint32_t histogram[kDigitBins];
  const bool narrowed = state.narrowed();
  const int64_t count = narrowed ? state.shared->candidates : state.n;
  const uint32_t prefix = find_prefix(state, round).bin;
  if (blockIdx.x * kOfBlock >= count) return;  // the same for all threads
  for (int i = static_cast<int>(threadIdx.x); i < kDigitBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const int shift = digit_shift(round), bins = digit_bins(round);
  const int above = round == 0 ? 31 : digit_shift(round - 1);
  for (int64_t first = blockIdx.x * kOfBlock; first < count; first += gridDim.x * kOfBlock) {
    const int64_t end = first + kOfBlock < count ? first + kOfBlock : count;
    for (int64_t i = first + threadIdx.x; i < end; i += 4 * kThreads) {
      Stored some[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int64_t at = i + u * kThreads;
        some[u] = at >= end ? Stored{} : narrowed ? static_cast<Stored>(state.value[at]) : x[at];
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const uint32_t magnitude = magnitude_of(Element::load(some[u]));
        if (i + u * kThreads < end && magnitude >> above == prefix) {
          atomicAdd(&histogram[(magnitude >> shift) & static_cast<uint32_t>(bins - 1)], 1u);
        }
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < bins; i += kThreads) {
    if (histogram[i]) atomicAdd(&state.shared->digits[round][i], histogram[i]);
  }
}

// ---- selection -----------------------------------------------------------------------------------------------------

// A warp goes over the elements of a tile, or over its candidates, in their order: visit(bits, index, exists, larger,
// equal), with the votes of the warp on what is above the k-th largest and on what equals it.
template <typename Element, typename Visit>
__device__ __forceinline__ void visit_tile(const typename Element::Stored* x, const State& state, uint32_t tile,
                                           bool narrowed, uint32_t threshold, Visit visit) {
  using Stored = typename Element::Stored;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t start = static_cast<uint32_t>(tile * kTile);
  const uint32_t left = state.n - start, first = narrowed ? state.first[tile] : start;
  const uint32_t count = narrowed ? state.count[tile] : left < kTile ? left : static_cast<uint32_t>(kTile);
  for (uint32_t i = 0; i < count; i += 128) {
    Stored some[4];
    uint32_t index[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t place = i + static_cast<uint32_t>(32 * u + lane), at = first + (place < count ? place : 0);
      some[u] = narrowed ? static_cast<Stored>(state.value[at]) : x[at];
      index[u] = narrowed ? state.index[at] : at;
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const bool exists = i + static_cast<uint32_t>(32 * u + lane) < count;
      const uint32_t magnitude = magnitude_of(Element::load(some[u]));
      const uint32_t larger = __ballot_sync(0xffffffffu, exists && magnitude > threshold);
      visit(some[u], index[u], larger, __ballot_sync(0xffffffffu, exists && magnitude == threshold));
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) count_kernel(const typename Element::Stored* x, const State state) {
  const uint32_t threshold = find_prefix(state, kRounds).bin;
  const bool narrowed = state.narrowed();
  for (uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32; tile < state.tiles; tile += gridDim.x * kWarps) {
    uint32_t larger = 0, equal = 0;
    visit_tile<Element>(x, state, tile, narrowed, threshold,
                        [&](typename Element::Stored, uint32_t, uint32_t above, uint32_t same) {
                          larger += static_cast<uint32_t>(__popc(above));
                          equal += static_cast<uint32_t>(__popc(same));
                        });
    if (threadIdx.x % 32 == 0) {
      state.larger[tile] = larger;
      state.equal[tile] = equal;
    }
  }
}

// One block turns the counts of the tiles into sums over the tiles before.
__global__ void __launch_bounds__(kScanThreads) offsets_kernel(const State state) {
  __shared__ uint32_t sums[kScanThreads / 32];
  const uint32_t share = (state.tiles + kScanThreads - 1) / kScanThreads;
  const uint32_t first = threadIdx.x * share < state.tiles ? threadIdx.x * share : state.tiles;
  const uint32_t end = first + share < state.tiles ? first + share : state.tiles;
  uint32_t larger = 0, equal = 0;
  for (uint32_t i = first; i < end; ++i) {
    larger += state.larger[i];
    equal += state.equal[i];
  }
  larger = sum_before<kScanThreads>(larger, sums);
  equal = sum_before<kScanThreads>(equal, sums);
  for (uint32_t i = first; i < end; ++i) {
    const uint32_t above = state.larger[i], same = state.equal[i];
    state.larger[i] = larger;
    state.equal[i] = equal;
    larger += above;
    equal += same;
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    write_kernel(const typename Element::Stored* x, const State state, uint32_t* indices, void* values, float* next) {
  typename Element::Stored* const to = static_cast<typename Element::Stored*>(values);
  const uint32_t threshold = state.shared->prefix[kRounds - 1], ties = state.shared->wanted[kRounds - 1];
  const bool narrowed = state.narrowed();
  const uint32_t below = lanes_below();
  for (uint32_t tile = blockIdx.x * kWarps + threadIdx.x / 32; tile < state.tiles; tile += gridDim.x * kWarps) {
    uint32_t equal = state.equal[tile], out = state.larger[tile] + (equal < ties ? equal : ties);
    visit_tile<Element>(x, state, tile, narrowed, threshold,
                        [&](typename Element::Stored bits, uint32_t index, uint32_t above, uint32_t same) {
                          const uint32_t lane = threadIdx.x % 32;
                          const uint32_t rank = equal + static_cast<uint32_t>(__popc(same & below));
                          const bool mine = (above >> lane & 1u) || ((same >> lane & 1u) && rank < ties);
                          const uint32_t taken = __ballot_sync(0xffffffffu, mine);
                          if (mine) {
                            const uint32_t place = out + static_cast<uint32_t>(__popc(taken & below));
                            indices[place] = index;
                            to[place] = bits;
                            if (next) next[index] = 0.0f;
                          }
                          out += static_cast<uint32_t>(__popc(taken));
                          equal += static_cast<uint32_t>(__popc(same));
                        });
  }
}

template <typename Element, typename Out>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const uint32_t* indices, const typename Element::Stored* values, int64_t k, int64_t n, float weight,
                   bool accumulate, typename Out::Stored* out) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < k; i += stride) {
    const uint32_t index = indices[i];
    if (index >= n) continue;
    const float before = accumulate ? Out::load(out[index]) : kNoError;
    out[index] = Out::store(keyed::fma_rn(Element::load(values[i]), weight, before));
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

unsigned blocks_for(int64_t tasks, int64_t of_block, int64_t most) {
  const int64_t blocks = (tasks + of_block - 1) / of_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

struct Select {
  const void* x;
  const float* error;
  float* next;
  float unscale;
  State state;
  void* payload;
  int64_t processors;
  cudaStream_t stream;

  template <typename Element>
  cudaError_t run() const {
    const Source<Element> source{static_cast<const typename Element::Stored*>(x), error, next, unscale};
    uint32_t rank = 0;
    if (state.capacity) {
      const uint32_t samples = static_cast<uint32_t>(state.n < 8 * kSamples ? state.n / 8 : kSamples);
      const double expected = static_cast<double>(samples) * state.k / state.n;
      const double most = std::ceil(expected + 4.0 * std::sqrt(expected) + 4.0);
      rank = most < samples ? static_cast<uint32_t>(most) : samples;
      const auto sample = sample_kernel<Element>;
      sample<<<blocks_for(samples, 2 * kThreads, 2 * processors), kThreads, 0, stream>>>(source, state, samples);
    }
    if (next) {
      collect<Element, true>(source, rank);
      return finish<Float32>(reinterpret_cast<const uint32_t*>(next));
    }
    if (state.capacity) collect<Element, false>(source, rank);
    return finish<Element>(source.x);
  }

 private:
  template <typename Element, bool kFeedback>
  void collect(const Source<Element>& source, uint32_t rank) const {
    bool wide = is_wide(source.x);
    if (kFeedback) {
      wide = wide && is_wide(reinterpret_cast<const uint32_t*>(error)) && is_wide(reinterpret_cast<uint32_t*>(next));
    }
    const auto kernel = collect_kernel<Element, kFeedback>;
    kernel<<<blocks_for(state.tiles, 1, 4 * processors), kThreads, 0, stream>>>(source, state, rank, wide);
  }

  template <typename Element>
  cudaError_t finish(const typename Element::Stored* from) const {
    const auto digits = digits_kernel<Element>;
    const auto count = count_kernel<Element>;
    const auto write = write_kernel<Element>;
    for (int round = 0; round < kRounds; ++round) {
      digits<<<blocks_for(state.n, kOfBlock, 4 * processors), kThreads, 0, stream>>>(from, state, round);
    }
    const unsigned blocks = blocks_for(state.tiles, kWarps, 8 * processors);
    uint32_t* const indices = static_cast<uint32_t*>(payload);
    count<<<blocks, kThreads, 0, stream>>>(from, state);
    offsets_kernel<<<1, kScanThreads, 0, stream>>>(state);
    write<<<blocks, kThreads, 0, stream>>>(from, state, indices, indices + state.k, next);
    return cudaGetLastError();
  }
};

template <typename Element>
struct ScatterTo {
  const uint32_t* indices;
  int64_t k, n;
  float weight;
  bool accumulate;
  void* out;
  cudaStream_t stream;

  template <typename Out>
  cudaError_t run() const {
    const auto kernel = scatter_kernel<Element, Out>;
    const auto* const values = reinterpret_cast<const typename Element::Stored*>(indices + k);
    kernel<<<blocks_for(k, kThreads, 1 << 20), kThreads, 0, stream>>>(indices, values, k, n, weight, accumulate,
                                                                       static_cast<typename Out::Stored*>(out));
    return cudaGetLastError();
  }
};

struct Scatter {
  const void* payload;
  int64_t k, n;
  float weight;
  bool accumulate;
  void* out;
  int out_dtype, device;
  cudaStream_t stream;

  template <typename Element>
  cudaError_t run() const {
    const ScatterTo<Element> work{static_cast<const uint32_t*>(payload), k, n, weight, accumulate, out, stream};
    return with_element(work, out_dtype, device);
  }
};

}  // namespace

extern "C" {

int ds_efficient_lgreco_topk_version() { return DS_EFFICIENT_LGRECO_TOPK_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ds_efficient_lgreco_select(const void* x, const float* error, float* new_error, double unscale, int64_t n,
                               int64_t k, void* payload, uint32_t* counters, uint32_t* candidates, uint32_t* tiles,
                               int64_t capacity, int dtype, int device, cudaStream_t stream) {
  if (k < 1 || n < k || n >= int64_t{1} << 31 || capacity < 0 || capacity > n) return cudaErrorInvalidValue;
  const cudaError_t set = cudaSetDevice(device);
  if (set != cudaSuccess) return set;
  int processors = 0;
  const cudaError_t got = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (got != cudaSuccess) return got;
  const int64_t all = (n + kTile - 1) / kTile;
  const State state{reinterpret_cast<Shared*>(counters), candidates, candidates + capacity, tiles, tiles + all,
                    tiles + 2 * all, tiles + 3 * all, static_cast<uint32_t>(n), static_cast<uint32_t>(k),
                    static_cast<uint32_t>(capacity), static_cast<uint32_t>(all)};
  const Select work{x, error, new_error, static_cast<float>(unscale), state, payload, processors, stream};
  return with_element(work, dtype, device);
}

int ds_efficient_lgreco_scatter(const void* payload, int64_t k, int64_t n, int dtype, double weight, int accumulate,
                                void* out, int out_dtype, int device, cudaStream_t stream) {
  if (k < 1 || n < k || n >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const Scatter work{payload, k, n, static_cast<float>(weight), accumulate != 0, out, out_dtype, device, stream};
  return with_element(work, dtype, device);
}

}  // extern "C"
