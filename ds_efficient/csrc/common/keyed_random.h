// Counter-based random numbers: the same bits from host C++ and from CUDA kernels.
//
// Version 1 of the stream (DS_EFFICIENT_KEYED_RANDOM_VERSION), under a 64-bit key:
//
//   word i          word i % 4 of Philox4x32-10 with key (low, high half of the key) and counter
//                   (low, high half of i / 4, 0, 0)
//   uniform i       (word i >> 8) * 2^-24
//   normal i        the standard normal quantile of (s + 1/2) / 2^32 + 1/2, where s is word i read as a
//                   signed number; computed as `normal_from_word` below, relative error < 3e-7, |z| < 6.34
//   rank word r, j  64 bits that order the elements j of row r in the choice of k of n: words 2 * (j % 2) (high
//                   half) and 2 * (j % 2) + 1 of Philox with counter (j / 2, low, high half of r, 1)
//
// Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// All floating-point steps are single IEEE-754 operations (conversion, multiplication, explicit fma, correctly
// rounded square root). There is no a * b + c outside an explicit fma, so that no compiler flag for contraction
// changes a bit; only -ffast-math (g++) or -use_fast_math (nvcc) would, and must not be used with this header.
#pragma once

#include <cstdint>
#include <cstring>

#define DS_EFFICIENT_KEYED_RANDOM_VERSION 1

#if defined(__CUDACC__)
#define DS_EFFICIENT_HD __host__ __device__ __forceinline__
#else
#define DS_EFFICIENT_HD inline
#endif

namespace ds_efficient {
namespace keyed {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr uint32_t kDomainElements = 0, kDomainRanks = 1;

struct Block {
  uint32_t word[4];
};

// One Philox4x32-10 block of counter (c0, c1, c2, c3).
DS_EFFICIENT_HD Block philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t b = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return Block{{c0, c1, c2, c3}};
}

// Words 4 * block .. 4 * block + 3 of the stream.
DS_EFFICIENT_HD Block words(uint64_t key, uint64_t block) {
  return philox(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0, kDomainElements);
}

// The block that holds the rank words of elements 2 * pair and 2 * pair + 1 of a row.
DS_EFFICIENT_HD Block rank_words(uint64_t key, uint64_t row, uint32_t pair) {
  return philox(key, pair, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), kDomainRanks);
}

DS_EFFICIENT_HD uint64_t rank_word(const Block& block, int which) {
  return (static_cast<uint64_t>(block.word[2 * which]) << 32) | block.word[2 * which + 1];
}

DS_EFFICIENT_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

DS_EFFICIENT_HD float sqrt_rn(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

DS_EFFICIENT_HD int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DS_EFFICIENT_HD float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Uniform on [0, 1): multiples of 2^-24.
DS_EFFICIENT_HD float uniform_from_word(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// -log(v) for v in (2^-32, 1 + 2^-23], absolute error < 2e-6. v = 2^exponent * (1 + f), |f| <= 1/3, and
// log(1 + f) / f is a minimax polynomial of degree 7 (relative error 1.7e-7).
DS_EFFICIENT_HD float negative_log(float v) {
  const int32_t bits = bits_of(v);
  const int32_t exponent = (bits - 0x3f2aaaab) >> 23;  // 0x3f2aaaab is 2/3
  const float f = float_of(bits - exponent * 0x800000) - 1.0f;
  float p = 0x1.3aafa2p-3f;
  p = fma_rn(p, f, -0x1.5e6fdep-3f);
  p = fma_rn(p, f, 0x1.5048b6p-3f);
  p = fma_rn(p, f, -0x1.956702p-3f);
  p = fma_rn(p, f, 0x1.0013fap-2f);
  p = fma_rn(p, f, -0x1.55618ap-2f);
  p = fma_rn(p, f, 0x1.ffffd6p-2f);
  p = fma_rn(p, f, -0x1.fffffap-1f);
  return fma_rn(f, p, static_cast<float>(exponent) * -0x1.62e43p-1f);
}

// Quantile divided by y for w = -log(1 - y^2) below kSplit: minimax of degree 9 in w (relative error 8e-8).
constexpr float kSplit = 6.25f;

DS_EFFICIENT_HD float central_ratio(float w) {
  const float t = w - 3.125f;
  float p = -0x1.ebbe4p-28f;
  p = fma_rn(p, t, -0x1.a81c78p-27f);
  p = fma_rn(p, t, 0x1.4ab87p-21f);
  p = fma_rn(p, t, -0x1.21205ap-19f);
  p = fma_rn(p, t, -0x1.4b369cp-16f);
  p = fma_rn(p, t, 0x1.15adc8p-12f);
  p = fma_rn(p, t, -0x1.12864ep-10f);
  p = fma_rn(p, t, -0x1.17a24ep-7f);
  p = fma_rn(p, t, 0x1.5bc936p-2f);
  return fma_rn(p, t, 0x1.2b57eep+1f);
}

// The same for w in [kSplit, 21.5]: minimax of degree 8 in sqrt(w) (relative error 4e-8).
DS_EFFICIENT_HD float tail_ratio(float w) {
  const float t = sqrt_rn(w < kSplit ? kSplit : w) - 3.57f;
  float p = 0x1.9a8402p-15f;
  p = fma_rn(p, t, -0x1.12027ap-12f);
  p = fma_rn(p, t, 0x1.1985c4p-11f);
  p = fma_rn(p, t, -0x1.85f974p-11f);
  p = fma_rn(p, t, 0x1.3eed2ep-10f);
  p = fma_rn(p, t, -0x1.4ae904p-9f);
  p = fma_rn(p, t, 0x1.0ab856p-8f);
  p = fma_rn(p, t, 0x1.6cdcaep+0f);
  return fma_rn(p, t, 0x1.344706p+2f);
}

// Standard normal. With the odd number n = 2 * |s + 1/2| < 2^32: y = n / 2^32 is the probability within +-|z|, and the
// tail 1 - y is converted from the exact integer 2^32 - n, so that it keeps full relative precision to the last word.
DS_EFFICIENT_HD float normal_from_word(uint32_t word) {
  const uint32_t sign = word & 0x80000000u;
  const uint32_t magnitude = (sign ? ~word : word);
  const uint32_t odd = 2u * magnitude + 1u;
  const float y = static_cast<float>(odd) * 0x1p-32f;
  const float tail = static_cast<float>(0u - odd) * 0x1p-32f;
  const float w = negative_log(fma_rn(tail, y, tail));  // (1 - y) (1 + y)
#if defined(__CUDA_ARCH__)
  const float ratio = w < kSplit ? central_ratio(w) : tail_ratio(w);  // 0.1 % of the lanes take the tail
#else
  const float central = central_ratio(w), outer = tail_ratio(w);  // both, so that the loop vectorises
  const float ratio = w < kSplit ? central : outer;
#endif
  const int32_t bits = bits_of(ratio * y);
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) | sign));
}

// Round to nearest, ties to even; the value is finite.
DS_EFFICIENT_HD uint16_t bfloat16_bits(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest, ties to even; |value| < 65504. Below 2^-14 the sum with 1/2 does the rounding to the grid
// of 2^-24 of the subnormal numbers.
DS_EFFICIENT_HD uint16_t float16_bits(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = static_cast<uint32_t>(bits_of(float_of(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3f000000u;
  return static_cast<uint16_t>(sign | (magnitude < 0x38800000u ? subnormal : normal));
}

// Uniform numbers rounded to 16 bits stay below 1: what would round to 1 becomes the largest number below it.
DS_EFFICIENT_HD uint16_t below_one(uint16_t bits, uint16_t one) {
  return bits < one ? bits : static_cast<uint16_t>(one - 1);
}
constexpr uint16_t kOneBfloat16 = 0x3f80, kOneFloat16 = 0x3c00;

}  // namespace keyed
}  // namespace ds_efficient
