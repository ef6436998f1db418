// Bucketed stochastic quantisation on the CPU; C ABI, no torch headers. See quantize_common.h.
// Built with -fno-math-errno -fno-trapping-math, which let the loops vectorise and change no result.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements_cpu.h"
#include "keyed_random_lanes.h"
#include "parallel.h"
#include "quantize_common.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int64_t kPerThread = 1 << 16;  // fewer elements than this are not worth a thread

// Orders as numbers do; its own inverse.
int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Of count >= 1 elements. By integers, since a loop for the smallest of floating-point numbers does not vectorise.
Scale scale_of_bucket(const float* x, int64_t count, int bits) {
  int32_t lo = ordered(keyed::bits_of(x[0])), hi = lo, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t raw = keyed::bits_of(x[i]), key = ordered(raw);
    lo = std::min(lo, key);
    hi = std::max(hi, key);
    largest = std::max(largest, raw & 0x7fffffff);
  }
  return scale_of(keyed::float_of(ordered(lo)), keyed::float_of(ordered(hi)), largest >= 0x7f800000, bits);
}

constexpr uint64_t low_bits(int count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// The bytes of a group, codes below 2^kBits, side by side: two by two, and so on.
template <int kBits>
uint64_t narrowed(uint64_t x) {
  x = (x & 0x00ff00ff00ff00ffu) | (x >> 8 & 0x00ff00ff00ff00ffu) << kBits;
  x = (x & 0x0000ffff0000ffffu) | (x >> 16 & 0x0000ffff0000ffffu) << 2 * kBits;
  return (x & low_bits(32)) | x >> 32 << 4 * kBits;
}

// Its inverse; what is above the group does not count.
template <int kBits>
uint64_t widened(uint64_t x) {
  constexpr uint64_t kPairs = low_bits(2 * kBits) * 0x0000000100000001u, kOnes = low_bits(kBits) * 0x0001000100010001u;
  x = (x & low_bits(4 * kBits)) | (x >> 4 * kBits & low_bits(4 * kBits)) << 32;
  x = (x & kPairs) | (x >> 2 * kBits & kPairs) << 16;
  return (x & kOnes) | (x >> kBits & kOnes) << 8;
}

// Codes of whole groups; `code` is filled with zeros up to one.
template <int kBits>
void pack_groups(const uint8_t* code, int64_t count, uint8_t* out) {
  const int64_t bytes = (count * kBits + 7) / 8;
  if constexpr (kBits == 4) {  // these loops vectorise
    for (int64_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
    return;
  }
  for (int64_t at = 0; at < bytes; at += kBits, code += kGroup) {
    uint64_t group;
    std::memcpy(&group, code, kGroup);
    group = narrowed<kBits>(group);
    if (at + kBits <= bytes) std::memcpy(out + at, &group, kBits);
    else std::memcpy(out + at, &group, static_cast<size_t>(bytes - at));
  }
}

template <int kBits>
void unpack_groups(const uint8_t* in, int64_t count, uint8_t* code) {
  const int64_t bytes = (count * kBits + 7) / 8;
  if constexpr (kBits == 4) {
    for (int64_t i = 0; i < bytes; ++i) {
      code[2 * i] = in[i] & 15;
      code[2 * i + 1] = in[i] >> 4;
    }
    return;
  }
  for (int64_t at = 0; at < bytes; at += kBits, code += kGroup) {
    uint64_t group = 0;
    if (at + kGroup <= bytes) std::memcpy(&group, in + at, kGroup);
    else std::memcpy(&group, in + at, static_cast<size_t>(std::min<int64_t>(kBits, bytes - at)));
    group = widened<kBits>(group);
    std::memcpy(code, &group, kGroup);
  }
}

// work(integral constant) with the number of bits, 2 to 8.
template <typename Work>
void with_bits(int bits, Work work) {
  switch (bits) {
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 5: return work(std::integral_constant<int, 5>());
    case 6: return work(std::integral_constant<int, 6>());
    case 7: return work(std::integral_constant<int, 7>());
    default: return work(std::integral_constant<int, 8>());
  }
}

void pack(const uint8_t* code, int64_t count, int bits, uint8_t* out) {
  with_bits(bits, [=](auto constant) { pack_groups<decltype(constant)::value>(code, count, out); });
}

void unpack(const uint8_t* in, int64_t count, int bits, uint8_t* code) {
  with_bits(bits, [=](auto constant) { unpack_groups<decltype(constant)::value>(in, count, code); });
}

// Where the buckets of a tensor stand in a payload of `all` buckets. `whole`: the last one is filled up by the tensor's
// last element.
struct Place {
  int64_t first, all;
  bool whole;

  int64_t scale(int64_t j) const { return 8 * (first + j); }
  int64_t codes(int64_t j, int64_t bucket, int bits) const { return 8 * all + (first + j) * bucket / 8 * bits; }
};

struct Quantize {
  const void* x;
  const float* error;
  float* new_error;
  float unscale;
  int64_t n;
  uint64_t key;
  int bits;
  int64_t bucket;
  uint8_t* payload;
  int threads;
  Place place;

  template <typename Element>
  int run() const {
    const int64_t grain = std::max<int64_t>(1, kPerThread / bucket);
    ds_efficient::run_parallel(buckets_of(n, bucket), grain, threads, [=](int64_t first, int64_t some) {
      for (int64_t j = first; j < first + some; ++j) one_bucket<Element>(j);
    });
    return kDone;
  }

 private:
  template <typename Element>
  void one_bucket(int64_t j) const {
    float value[kMostBucket];
    uint8_t code[kMostBucket];
    const int64_t start = j * bucket, own = std::min(bucket, n - start), count = place.whole ? bucket : own;
    const int64_t whole = (count + kGroup - 1) / kGroup * kGroup;
    value[0] = 0.0f;  // a bucket has an element, which the compiler does not know
    load<Element>(start, own, value);
    std::fill(value + own, value + count, value[own - 1]);
    const Scale scale = scale_of_bucket(value, count, bits);
    const float factor = factor_of(scale);
    std::memcpy(payload + place.scale(j), &scale, sizeof scale);
    if (factor != 0) {
      draw_codes(place.first + j, count, value, scale.lo, factor, code);
      std::fill(code + count, code + whole, uint8_t{0});
    } else {
      std::fill(code, code + whole, uint8_t{0});
    }
    pack(code, count, bits, payload + place.codes(j, bucket, bits));
    if (new_error) {
      float* const next = new_error + start;
      for (int64_t i = 0; i < own; ++i) next[i] = value[i] - value_of(scale, code[i]);
    }
  }

  void draw_codes(int64_t j, int64_t count, const float* value, float lo, float factor, uint8_t* code) const {
    const uint32_t most = (1u << bits) - 1;
    uint32_t word[kOfBlocks / 2];
    uint16_t random[kOfBlocks];
    for (int64_t first = 0; first < count; first += kOfBlocks) {
      const uint64_t block = first_block(j, bucket) + static_cast<uint64_t>(first / kOfBlocks * 32);
      for (int i = 0; i < kOfBlocks / 2; i += keyed::kChunk) {
        keyed::chunk_words(key, block + static_cast<uint64_t>(i / 4), word + i);
      }
      for (int lane = 0; lane < 32; ++lane) {  // little endian: the low half of a word comes first
        std::memcpy(random + 4 * lane, word + 4 * lane, 8);
        std::memcpy(random + 128 + 4 * lane, word + 4 * lane + 2, 8);
      }
      const int64_t some = std::min<int64_t>(kOfBlocks, count - first);
      const float* const from = value + first;
      uint8_t* const to = code + first;
      for (int64_t i = 0; i < some; ++i) {
        to[i] = static_cast<uint8_t>(code_of(from[i], lo, factor, random[i], most));
      }
    }
  }

  template <typename Element>
  void load(int64_t start, int64_t count, float* value) const {
    const auto* const from = static_cast<const typename Element::Stored*>(x) + start;
    for (int64_t i = 0; i < count; ++i) value[i] = Element::load(from[i]);
    if (!new_error) return;
    if (error) {
      for (int64_t i = 0; i < count; ++i) value[i] = corrected(value[i], unscale, error[start + i]);
    } else {
      for (int64_t i = 0; i < count; ++i) value[i] = corrected(value[i], unscale, kNoError);
    }
  }
};

struct Dequantize {
  const uint8_t* payload;
  int64_t ranks, stride, n;
  int bits;
  int64_t bucket;
  float weight;
  bool accumulate;
  void* out;
  int threads;
  Place place;

  template <typename Element>
  int run() const {
    const int64_t grain = std::max<int64_t>(1, kPerThread / bucket / ranks);
    ds_efficient::run_parallel(buckets_of(n, bucket), grain, threads, [=](int64_t first, int64_t some) {
      for (int64_t j = first; j < first + some; ++j) one_bucket<Element>(j);
    });
    return kDone;
  }

 private:
  template <typename Element>
  void one_bucket(int64_t j) const {
    float sum[kMostBucket];
    uint8_t code[kMostBucket];
    const int64_t start = j * bucket, count = std::min(bucket, n - start);
    auto* const to = static_cast<typename Element::Stored*>(out) + start;
    for (int64_t i = 0; i < count; ++i) sum[i] = accumulate ? Element::load(to[i]) : kNoError;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const uint8_t* const from = payload + rank * stride;
      Scale scale;
      std::memcpy(&scale, from + place.scale(j), sizeof scale);
      unpack(from + place.codes(j, bucket, bits), count, bits, code);
      for (int64_t i = 0; i < count; ++i) sum[i] = keyed::fma_rn(value_of(scale, code[i]), weight, sum[i]);
    }
    for (int64_t i = 0; i < count; ++i) to[i] = Element::store(sum[i]);
  }
};

int64_t buckets_of_all(const int64_t* counts, int64_t parts, int64_t bucket) {
  int64_t all = 0;
  for (int64_t part = 0; part < parts; ++part) all += buckets_of(counts[part], bucket);
  return all;
}

bool has_code(int bits, int64_t bucket) {
  return bits >= 2 && bits <= 8 && bucket >= kGroup && bucket <= kMostBucket && bucket % kGroup == 0;
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_quantize_version() { return DS_EFFICIENT_LGRECO_QUANTIZE_VERSION; }

int ds_efficient_lgreco_quantize(const void* x, const float* error, float* new_error, double unscale, int64_t n,
                                 uint64_t key, int bits, int64_t bucket, void* payload, int dtype, int threads) {
  if (!has_code(bits, bucket)) return kUnknown;
  const Quantize work{x, error, new_error, static_cast<float>(unscale), n, key, bits, bucket,
                      static_cast<uint8_t*>(payload), threads, Place{0, buckets_of(n, bucket), false}};
  return with_element(work, dtype);
}

int ds_efficient_lgreco_quantize_parts(const void* const* x, const int64_t* counts, int64_t parts, uint64_t key,
                                       int bits, int64_t bucket, void* payload, int dtype, int threads) {
  if (!has_code(bits, bucket)) return kUnknown;
  const int64_t all = buckets_of_all(counts, parts, bucket);
  for (int64_t part = 0, first = 0; part < parts; first += buckets_of(counts[part++], bucket)) {
    const Quantize work{x[part], nullptr, nullptr, 1.0f, counts[part], key, bits, bucket,
                        static_cast<uint8_t*>(payload), threads, Place{first, all, true}};
    if (with_element(work, dtype) != kDone) return kUnknown;
  }
  return kDone;
}

int ds_efficient_lgreco_dequantize(const void* payload, int64_t ranks, int64_t stride, int64_t n, int bits,
                                   int64_t bucket, double weight, int accumulate, void* out, int dtype, int threads) {
  if (!has_code(bits, bucket) || ranks < 1) return kUnknown;
  const Dequantize work{static_cast<const uint8_t*>(payload), ranks, stride, n, bits, bucket,
                        static_cast<float>(weight), accumulate != 0, out, threads,
                        Place{0, buckets_of(n, bucket), false}};
  return with_element(work, dtype);
}

int ds_efficient_lgreco_dequantize_parts(const void* payload, int64_t ranks, int64_t stride, void* const* out,
                                         const int64_t* counts, int64_t parts, int bits, int64_t bucket, double weight,
                                         int dtype, int threads) {
  if (!has_code(bits, bucket) || ranks < 1) return kUnknown;
  const int64_t all = buckets_of_all(counts, parts, bucket);
  for (int64_t part = 0, first = 0; part < parts; first += buckets_of(counts[part++], bucket)) {
    const Dequantize work{static_cast<const uint8_t*>(payload), ranks, stride, counts[part], bits, bucket,
                          static_cast<float>(weight), false, out[part], threads, Place{first, all, true}};
    if (with_element(work, dtype) != kDone) return kUnknown;
  }
  return kDone;
}

}  // extern "C"
