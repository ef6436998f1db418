// Bucketed stochastic quantisation of gradients (QSGD): definition of every bit, and the C ABI of the compiled code.
//
// n elements are cut into buckets of `bucket` elements (a multiple of 8, at most kMostBucket), the last one may be
// shorter. A bucket has, in float32, its smallest element lo and unit = max((hi - lo) / (2^bits - 1), 2^-100). Element i
// gets a code below 2^bits by stochastic rounding with a number h(i) below 2^16:
//
//   code(i) = min((int((x - lo) * (2^16 / unit) + 1/2) + h(i)) >> 16, 2^bits - 1)
//   value   = lo + code * unit, rounded once
//
// so that |value - x| is at most the unit and E[value] = x to 2^-17 of the unit beyond float32's rounding. A bucket
// with an element that is not finite, or with hi - lo above float32's range, has lo = unit = NaN and codes 0: all its
// values are NaN, which overflow checks see. A bucket of equal elements, zeros above all, comes back exactly.
//
// h: a Philox block of the stream of the key (common/keyed_random.h) has 8 numbers of 16 bits, the low half of a word
// before the high. Element e of bucket j takes number e % 4 + 4 * (e / 128 % 2) of the block
// e / 4 % 32 + 32 * (e / 256 + ceil(bucket / 256) * j): a lane of a warp has the four elements from 4 * lane on of every
// 128, and takes one block for two of these.
//
// With error feedback what is quantised is c = unscale * x + error, in float32, rounded once, and c - value of each
// element is written: the error of the next step.
//
// Payload, little endian: (lo, unit) of each bucket, 8 bytes; then the codes as one stream of bits, code i at bits
// i * bits .. of it, in all ceil(n * bits / 8) bytes. Unused bits of the last byte are 0.
//
// ABI (extern "C"; the CPU functions end with `int threads` and return 0 or 1 for arguments without code; the CUDA
// functions end with `int device, cudaStream_t stream` and return a cudaError_t). n >= 1, 2 <= bits <= 8; payloads are
// aligned to 8 bytes; x, errors and out hold n adjacent elements, x and out of `dtype`, any alignment of its elements.
//
//   int ds_efficient_lgreco_quantize_version()                  DS_EFFICIENT_LGRECO_QUANTIZE_VERSION
//   int ds_efficient_lgreco_quantize(const void* x, const float* error, float* new_error, double unscale, int64_t n,
//                                    uint64_t key, int bits, int64_t bucket, void* payload, int dtype, ...)
//     new_error is null without feedback; with it error is null, new_error, or other memory.
//   int ds_efficient_lgreco_dequantize(const void* payload, int64_t ranks, int64_t stride, int64_t n, int bits,
//                                      int64_t bucket, double weight, int accumulate, void* out, int dtype, ...)
//     The sum over `ranks` >= 1 payloads, `stride` bytes apart (a multiple of 8), in their order: out[i] begins with
//     weight * value of the first, or with out[i] + weight * value; one rounding a payload, in float32; then rounded
//     to `dtype`.
//
// On the CPU only, several tensors of one `dtype` as one, each filled up to whole buckets by its last element; counts[p]
// >= 1 elements of part p:
//
//   int ds_efficient_lgreco_quantize_parts(const void* const* x, const int64_t* counts, int64_t parts, uint64_t key,
//                                          int bits, int64_t bucket, void* payload, int dtype, int threads)
//   int ds_efficient_lgreco_dequantize_parts(const void* payload, int64_t ranks, int64_t stride, void* const* out,
//                                            const int64_t* counts, int64_t parts, int bits, int64_t bucket,
//                                            double weight, int dtype, int threads)
#pragma once

#include <cstdint>

#include "elements.h"

#define DS_EFFICIENT_LGRECO_QUANTIZE_VERSION 3

namespace ds_efficient {
namespace lgreco {

constexpr int64_t kMostBucket = 1024;
constexpr int kFractionBits = 16;
constexpr int kOfBlocks = 256;  // elements that share 32 Philox blocks
constexpr int kGroup = 8;  // codes of a group fill `bits` bytes

struct Scale {
  float lo, unit;
};

// lo, hi: smallest and largest element; `bad` where one is not finite.
DS_EFFICIENT_HD Scale scale_of(float lo, float hi, bool bad, int bits) {
  const float range = hi - lo;
  if (bad || !(range <= 0x1.fffffep127f)) return Scale{not_a_number(), not_a_number()};
  const float unit = range / static_cast<float>((1 << bits) - 1);
  return Scale{lo + 0.0f, unit > 0x1p-100f ? unit : 0x1p-100f};  // -0 becomes 0
}

// What elements are multiplied with before they are rounded; 0 where every code is 0.
DS_EFFICIENT_HD float factor_of(const Scale& scale) {
  return scale.unit == scale.unit ? 0x1p16f / scale.unit : 0.0f;
}

// One subtraction, one fused multiplication and addition, one conversion: nothing that a compiler could contract. lo and
// x are finite, `half` is below 2^16.
DS_EFFICIENT_HD uint32_t code_of(float x, float lo, float factor, uint32_t half, uint32_t most) {
  const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>(keyed::fma_rn(x - lo, factor, 0.5f)));
  const uint32_t code = (fixed + half) >> kFractionBits;
  return code < most ? code : most;
}

// The first Philox block of a bucket.
DS_EFFICIENT_HD uint64_t first_block(int64_t j, int64_t bucket) {
  return static_cast<uint64_t>(j) * static_cast<uint64_t>((bucket + kOfBlocks - 1) / kOfBlocks * 32);
}

DS_EFFICIENT_HD float value_of(const Scale& scale, uint32_t code) {
  return keyed::fma_rn(static_cast<float>(code), scale.unit, scale.lo);
}

DS_EFFICIENT_HD int64_t buckets_of(int64_t n, int64_t bucket) { return (n + bucket - 1) / bucket; }

}  // namespace lgreco
}  // namespace ds_efficient
