// Bucketed stochastic quantisation of gradients (QSGD): definition of every bit, and the C ABI of the compiled code.
//
// n elements are cut into buckets of `bucket` elements (a multiple of 8, at most kMostBucket), the last one may be
// shorter. A bucket has, in float32, its smallest element lo and unit = max((hi - lo) / (2^bits - 1), 2^-100). Element i
// gets a code below 2^bits by stochastic rounding with word i of the stream of the key (common/keyed_random.h):
//
//   code(i) = min((int((x - lo) * (2^22 / unit)) + (word(i) >> 10)) >> 22, 2^bits - 1)
//   value   = lo + code * unit, rounded once
//
// so that |value - x| is at most the unit and E[value] = x to 2^-22 of the unit beyond float32's rounding. A bucket
// with an element that is not finite, or with hi - lo above float32's range, has lo = unit = NaN and codes 0: all its
// values are NaN, which overflow checks see. A bucket of equal elements, zeros above all, comes back exactly.
//
// Payload, little endian: (lo, unit) of each bucket, 8 bytes; then the codes as one stream of bits, code i at bits
// i * bits .. of it, in all ceil(n * bits / 8) bytes. Unused bits of the last byte are 0.
//
// ABI (extern "C"; the CPU functions end with `int threads` and return 0 or 1 for arguments without code; the CUDA
// functions end with `int device, cudaStream_t stream` and return a cudaError_t). n >= 1, 2 <= bits <= 8; payloads are
// aligned to 8 bytes; x and out hold n adjacent elements of `dtype`, any alignment of its elements.
//
//   int ds_efficient_lgreco_quantize_version()                  DS_EFFICIENT_LGRECO_QUANTIZE_VERSION
//   int ds_efficient_lgreco_quantize(const void* x, int64_t n, uint64_t key, int bits, int64_t bucket, void* payload,
//                                    int dtype, ...)
//   int ds_efficient_lgreco_dequantize(const void* payload, int64_t n, int bits, int64_t bucket, double weight,
//                                      int accumulate, void* out, int dtype, ...)
//     out[i] = weight * value, or out[i] + weight * value with one rounding; in float32, then rounded to `dtype`.
#pragma once

#include <cstdint>

#include "keyed_random.h"

#define DS_EFFICIENT_LGRECO_QUANTIZE_VERSION 1

namespace ds_efficient {
namespace lgreco {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

constexpr int64_t kMostBucket = 1024;
constexpr int kFractionBits = 22;
constexpr int kGroup = 8;  // codes of a group fill `bits` bytes

struct Scale {
  float lo, unit;
};

DS_EFFICIENT_HD float not_a_number() { return keyed::float_of(0x7fc00000); }

// lo, hi: smallest and largest element; `bad` where one is not finite.
DS_EFFICIENT_HD Scale scale_of(float lo, float hi, bool bad, int bits) {
  const float range = hi - lo;
  if (bad || !(range <= 0x1.fffffep127f)) return Scale{not_a_number(), not_a_number()};
  const float unit = range / static_cast<float>((1 << bits) - 1);
  return Scale{lo + 0.0f, unit > 0x1p-100f ? unit : 0x1p-100f};  // -0 becomes 0
}

// What elements are multiplied with before they are rounded; 0 where every code is 0.
DS_EFFICIENT_HD float factor_of(const Scale& scale) {
  return scale.unit == scale.unit ? 0x1p22f / scale.unit : 0.0f;
}

// One subtraction, one multiplication, one conversion: nothing that a compiler could contract. lo and x are finite.
DS_EFFICIENT_HD uint32_t code_of(float x, float lo, float factor, uint32_t word, uint32_t most) {
  const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>((x - lo) * factor));
  const uint32_t code = (fixed + (word >> (32 - kFractionBits))) >> kFractionBits;
  return code < most ? code : most;
}

DS_EFFICIENT_HD float value_of(const Scale& scale, uint32_t code) {
  return keyed::fma_rn(static_cast<float>(code), scale.unit, scale.lo);
}

DS_EFFICIENT_HD bool is_finite(float value) { return (keyed::bits_of(value) & 0x7f800000) != 0x7f800000; }

DS_EFFICIENT_HD uint16_t bfloat16_of(float value) {
  return value == value ? keyed::bfloat16_bits(value) : static_cast<uint16_t>(0x7fc0);
}

DS_EFFICIENT_HD float float_of_bfloat16(uint16_t bits) {
  return keyed::float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
}

DS_EFFICIENT_HD int64_t buckets_of(int64_t n, int64_t bucket) { return (n + bucket - 1) / bucket; }

}  // namespace lgreco
}  // namespace ds_efficient
