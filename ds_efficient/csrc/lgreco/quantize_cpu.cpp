// Bucketed stochastic quantisation on the CPU; C ABI, no torch headers. See quantize_common.h.
// Built with -fno-math-errno -fno-trapping-math, which let the loops vectorise and change no result.
#include <algorithm>
#include <cstdint>
#include <cstring>

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

// Codes of whole groups; `code` is filled with zeros up to one.
void pack(const uint8_t* code, int64_t count, int bits, uint8_t* out) {
  const int64_t bytes = (count * bits + 7) / 8;
  if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) out[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
    return;
  }
  for (int64_t first = 0, at = 0; first < count; first += kGroup, at += bits) {
    uint64_t group = 0;
    for (int e = 0; e < kGroup; ++e) group |= static_cast<uint64_t>(code[first + e]) << (bits * e);
    std::memcpy(out + at, &group, static_cast<size_t>(std::min<int64_t>(bits, bytes - at)));
  }
}

void unpack(const uint8_t* in, int64_t count, int bits, uint8_t* code) {
  const int64_t bytes = (count * bits + 7) / 8;
  if (bits == 4) {
    for (int64_t i = 0; i < bytes; ++i) {
      code[2 * i] = in[i] & 15;
      code[2 * i + 1] = in[i] >> 4;
    }
    return;
  }
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for (int64_t first = 0, at = 0; first < count; first += kGroup, at += bits) {
    uint64_t group = 0;
    std::memcpy(&group, in + at, static_cast<size_t>(std::min<int64_t>(bits, bytes - at)));
    for (int e = 0; e < kGroup; ++e) code[first + e] = static_cast<uint8_t>(group >> (bits * e) & mask);
  }
}

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
    const int64_t start = j * bucket, count = std::min(bucket, n - start);
    const int64_t whole = (count + kGroup - 1) / kGroup * kGroup;
    value[0] = 0.0f;  // a bucket has an element, which the compiler does not know
    load<Element>(start, count, value);
    const Scale scale = scale_of_bucket(value, count, bits);
    const float factor = factor_of(scale);
    std::memcpy(payload + 8 * j, &scale, sizeof scale);
    if (factor != 0) {
      draw_codes(j, count, value, scale.lo, factor, code);
      std::fill(code + count, code + whole, uint8_t{0});
    } else {
      std::fill(code, code + whole, uint8_t{0});
    }
    pack(code, count, bits, payload + 8 * buckets_of(n, bucket) + start / 8 * bits);
    if (new_error) {
      float* const next = new_error + start;
      for (int64_t i = 0; i < count; ++i) next[i] = value[i] - value_of(scale, code[i]);
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
      std::memcpy(&scale, from + 8 * j, sizeof scale);
      unpack(from + 8 * buckets_of(n, bucket) + start / 8 * bits, count, bits, code);
      for (int64_t i = 0; i < count; ++i) sum[i] = keyed::fma_rn(value_of(scale, code[i]), weight, sum[i]);
    }
    for (int64_t i = 0; i < count; ++i) to[i] = Element::store(sum[i]);
  }
};

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
                      static_cast<uint8_t*>(payload), threads};
  return with_element(work, dtype);
}

int ds_efficient_lgreco_dequantize(const void* payload, int64_t ranks, int64_t stride, int64_t n, int bits,
                                   int64_t bucket, double weight, int accumulate, void* out, int dtype, int threads) {
  if (!has_code(bits, bucket) || ranks < 1) return kUnknown;
  const Dequantize work{static_cast<const uint8_t*>(payload), ranks, stride, n, bits, bucket,
                        static_cast<float>(weight), accumulate != 0, out, threads};
  return with_element(work, dtype);
}

}  // extern "C"
