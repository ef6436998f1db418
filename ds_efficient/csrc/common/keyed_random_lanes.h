// Stretches of a keyed stream on the host, many Philox blocks side by side, so that loops over their words vectorise
// (with -fno-math-errno -fno-trapping-math, which change no result). See keyed_random.h for the streams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "keyed_random.h"

namespace ds_efficient {
namespace keyed {

constexpr int kLanes = 16;               // blocks computed side by side
constexpr int kChunk = 4 * kLanes;       // words of these

// Words 4 * first .. 4 * first + kChunk - 1.
#if defined(__AVX2__)

// By hand: GCC neither vectorises the rounds nor, unrolled, the lanes. A number is the low half of a 64-bit lane, where
// it is multiplied; what is above it does not count.
inline void chunk_words(uint64_t key, uint64_t first, uint32_t* out) {
  constexpr int kVectors = kLanes / 4;
  __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const __m256i begin = _mm256_set1_epi64x(static_cast<int64_t>(first + 4 * static_cast<uint64_t>(v)));
    const __m256i block = _mm256_add_epi64(begin, _mm256_set_epi64x(3, 2, 1, 0));
    c0[v] = block;
    c1[v] = _mm256_srli_epi64(block, 32);
    c2[v] = _mm256_setzero_si256();
    c3[v] = _mm256_set1_epi64x(kDomainElements);
  }
  const __m256i m0 = _mm256_set1_epi64x(kMultiplier0), m1 = _mm256_set1_epi64x(kMultiplier1);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i a = _mm256_mul_epu32(c0[v], m0), b = _mm256_mul_epu32(c2[v], m1);
      c0[v] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(c1[v], key0));
      c2[v] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(c3[v], key1));
      c1[v] = b;
      c3[v] = a;
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  for (int v = 0; v < kVectors; ++v) {
    const __m256i c01 = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
    const __m256i c23 = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
    const __m256i even = _mm256_unpacklo_epi64(c01, c23);  // blocks 0 and 2
    const __m256i odd = _mm256_unpackhi_epi64(c01, c23);
    auto* const to = reinterpret_cast<__m256i*>(out + 16 * v);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
}

#else

inline void chunk_words(uint64_t key, uint64_t first, uint32_t* out) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t block = first + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(block);
    c1[i] = static_cast<uint32_t>(block >> 32);
    c2[i] = 0;
    c3[i] = kDomainElements;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t a = static_cast<uint64_t>(kMultiplier0) * c0[i];
      const uint64_t b = static_cast<uint64_t>(kMultiplier1) * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  for (int i = 0; i < kLanes; ++i) {
    out[4 * i] = c0[i];
    out[4 * i + 1] = c1[i];
    out[4 * i + 2] = c2[i];
    out[4 * i + 3] = c3[i];
  }
}

#endif

// out[i] = convert(word offset + i) for i in [0, n).
template <typename T, typename Convert>
void fill_range(uint64_t key, uint64_t offset, int64_t n, T* out, Convert convert) {
  uint32_t word[kChunk];
  T value[kChunk];
  int64_t skip = static_cast<int64_t>(offset % 4), done = 0;
  for (uint64_t block = offset / 4; done < n; block += kLanes) {
    chunk_words(key, block, word);
    for (int i = 0; i < kChunk; ++i) value[i] = convert(word[i]);
    const int64_t count = std::min<int64_t>(kChunk - skip, n - done);
    std::memcpy(out + done, value + skip, static_cast<size_t>(count) * sizeof(T));
    done += count;
    skip = 0;
  }
}

}  // namespace keyed
}  // namespace ds_efficient
