// The k largest entries by magnitude: definition, and the C ABI of the compiled code.
//
// Of n elements the k with the largest magnitudes are selected, exactly. NaN counts as infinity; of equal magnitudes
// those with the lowest indices are taken. Payload: k indices, ascending, int32; then the k values, in the same order.
//
// With error feedback the selection is from c = unscale * x + error, in float32, rounded once; the values are float32,
// and c is written with zeros in place of what was selected: the error of the next step.
//
// ABI (extern "C"; the CPU functions end with `int threads` and return 0, 1 for arguments without code, 2 where memory
// runs out; the CUDA functions end with `int device, cudaStream_t stream` and return a cudaError_t). 1 <= k <= n < 2^31;
// x, error, new_error and out hold n adjacent elements; payload is aligned to 4 bytes.
//
//   int ds_efficient_lgreco_topk_version()                       DS_EFFICIENT_LGRECO_TOPK_VERSION
//   int ds_efficient_lgreco_select(const void* x, const float* error, float* new_error, double unscale, int64_t n,
//                                  int64_t k, void* payload, int dtype, ...)
//     new_error is null without feedback; with it error is null, new_error, or other memory. On CUDA four arguments
//     come before dtype: uint32_t* counters (kCounters of them, zeros), uint32_t* candidates (2 * capacity),
//     uint32_t* tiles (4 * ceil(n / kTile)), int64_t capacity (0: the elements are not sampled).
//   int ds_efficient_lgreco_scatter(const void* payload, int64_t k, int64_t n, int dtype, double weight,
//                                   int accumulate, void* out, int out_dtype, ...)
//     out[index] = weight * value, or out[index] + weight * value with one rounding; in float32, then rounded to
//     out_dtype. Other elements stay as they are. dtype is that of the values. Indices outside of 0 .. n - 1 are skipped.
#pragma once

#include <cstdint>

#include "elements.h"

#define DS_EFFICIENT_LGRECO_TOPK_VERSION 1

namespace ds_efficient {
namespace lgreco {

constexpr int64_t kTile = 4096;  // elements of a tile, whose selected entries are adjacent in the payload

// The 31 bits of a magnitude are found in digits of 11, 10 and 10 bits, the highest first.
constexpr int kRounds = 3, kDigitBins = 2048;
constexpr int kSampleBins = 4096, kSampleShift = 19;  // a bin of the sample: 16 to a power of two
constexpr int64_t kCounters = kSampleBins + kRounds * kDigitBins + 16;

DS_EFFICIENT_HD int digit_shift(int round) { return round == 0 ? 20 : round == 1 ? 10 : 0; }
DS_EFFICIENT_HD int digit_bins(int round) { return round == 0 ? 2048 : 1024; }

// Orders as magnitudes do.
DS_EFFICIENT_HD uint32_t magnitude_of(float value) {
  const uint32_t bits = static_cast<uint32_t>(keyed::bits_of(value)) & 0x7fffffffu;
  return bits < 0x7f800000u ? bits : 0x7f800000u;
}

// The place that is sampled for number j of a sample with one element of every `stride`: spread, so that the rows of a
// matrix do not beat with it.
DS_EFFICIENT_HD int64_t sampled_place(int64_t j, int64_t stride) {
  return j * stride + static_cast<int64_t>((static_cast<uint32_t>(j) * 2654435769u) >> 8) % stride;
}

}  // namespace lgreco
}  // namespace ds_efficient
