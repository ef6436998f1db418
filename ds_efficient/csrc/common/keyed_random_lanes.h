// Stretches of a keyed stream on the host, many Philox blocks side by side so that the loops vectorise (with
// -fno-math-errno -fno-trapping-math, which change no result). See keyed_random.h for the streams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keyed_random.h"

namespace ds_efficient {
namespace keyed {

constexpr int kLanes = 16;               // blocks computed side by side
constexpr int kChunk = 4 * kLanes;       // words of these

// Words 4 * first .. 4 * first + kChunk - 1.
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
