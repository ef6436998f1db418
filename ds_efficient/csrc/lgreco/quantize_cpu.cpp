// Bucketed stochastic quantisation on the CPU; C ABI, no torch headers. See quantize_common.h.
// Built with -fno-math-errno -fno-trapping-math, which let the loops vectorise and change no result.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "keyed_random_lanes.h"
#include "parallel.h"
#include "quantize_common.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int64_t kPerThread = 1 << 16;  // fewer elements than this are not worth a thread

enum Status { kDone = 0, kUnknown = 1 };

struct Float32 {
  using Stored = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static float load(uint16_t bits) { return float_of_bfloat16(bits); }
  static uint16_t store(float value) { return bfloat16_of(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static float load(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7fffu;
    const float subnormal = keyed::float_of(static_cast<int32_t>(0x3f000000u + magnitude)) - 0.5f;  // units of 2^-24
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
    const uint32_t value = magnitude < 0x400u ? static_cast<uint32_t>(keyed::bits_of(subnormal)) : normal;
    return keyed::float_of(static_cast<int32_t>(value | (bits & 0x8000u) << 16));
  }
  static uint16_t store(float value) {
    if (value != value) return 0x7e00;
    const uint16_t sign = value < 0 ? 0x8000 : 0;
    return value >= 65520.0f || value <= -65520.0f ? static_cast<uint16_t>(sign | 0x7c00) : keyed::float16_bits(value);
  }
};

// Smallest and largest of count >= 1 elements; all loops are plain so that they vectorise.
Scale scale_of_bucket(const float* x, int64_t count, int bits) {
  float lo = x[0], hi = x[0];
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
    const int32_t magnitude = keyed::bits_of(x[i]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return scale_of(lo, hi, largest >= 0x7f800000, bits);
}

// Codes of whole groups; `code` is filled with zeros up to one.
void pack(const uint8_t* code, int64_t count, int bits, uint8_t* out) {
  const int64_t bytes = (count * bits + 7) / 8;
  for (int64_t first = 0, at = 0; first < count; first += kGroup, at += bits) {
    uint64_t group = 0;
    for (int e = 0; e < kGroup; ++e) group |= static_cast<uint64_t>(code[first + e]) << (bits * e);
    std::memcpy(out + at, &group, static_cast<size_t>(std::min<int64_t>(bits, bytes - at)));
  }
}

void unpack(const uint8_t* in, int64_t count, int bits, uint8_t* code) {
  const int64_t bytes = (count * bits + 7) / 8;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  for (int64_t first = 0, at = 0; first < count; first += kGroup, at += bits) {
    uint64_t group = 0;
    std::memcpy(&group, in + at, static_cast<size_t>(std::min<int64_t>(bits, bytes - at)));
    for (int e = 0; e < kGroup; ++e) code[first + e] = static_cast<uint8_t>(group >> (bits * e) & mask);
  }
}

template <typename Element>
void quantize(const void* from, int64_t n, uint64_t key, int bits, int64_t bucket, uint8_t* payload, int threads) {
  using Stored = typename Element::Stored;
  const Stored* const source = static_cast<const Stored*>(from);
  const int64_t buckets = buckets_of(n, bucket);
  const uint32_t most = (1u << bits) - 1;
  ds_efficient::run_parallel(buckets, std::max<int64_t>(1, kPerThread / bucket), threads, [=](int64_t j, int64_t some) {
    float x[kMostBucket];
    uint32_t word[kMostBucket];
    uint8_t code[kMostBucket];
    for (const int64_t end = j + some; j < end; ++j) {
      const int64_t start = j * bucket, count = std::min(bucket, n - start);
      for (int64_t i = 0; i < count; ++i) x[i] = Element::load(source[start + i]);
      const Scale scale = scale_of_bucket(x, count, bits);
      const float factor = factor_of(scale);
      std::memcpy(payload + 8 * j, &scale, sizeof scale);
      const int64_t whole = (count + kGroup - 1) / kGroup * kGroup;
      if (factor != 0) {
        keyed::fill_range(key, static_cast<uint64_t>(start), count, word, [](uint32_t w) { return w; });
        for (int64_t i = 0; i < count; ++i) {
          code[i] = static_cast<uint8_t>(code_of(x[i], scale.lo, factor, word[i], most));
        }
        std::fill(code + count, code + whole, uint8_t{0});
      } else {
        std::fill(code, code + whole, uint8_t{0});
      }
      pack(code, count, bits, payload + 8 * buckets + start / 8 * bits);
    }
  });
}

template <typename Element>
void dequantize(const uint8_t* payload, int64_t n, int bits, int64_t bucket, float weight, bool accumulate, void* to,
                int threads) {
  using Stored = typename Element::Stored;
  Stored* const target = static_cast<Stored*>(to);
  const int64_t buckets = buckets_of(n, bucket);
  ds_efficient::run_parallel(buckets, std::max<int64_t>(1, kPerThread / bucket), threads, [=](int64_t j, int64_t some) {
    uint8_t code[kMostBucket];
    for (const int64_t end = j + some; j < end; ++j) {
      const int64_t start = j * bucket, count = std::min(bucket, n - start);
      Scale scale;
      std::memcpy(&scale, payload + 8 * j, sizeof scale);
      unpack(payload + 8 * buckets + start / 8 * bits, count, bits, code);
      Stored* const out = target + start;
      if (accumulate) {
        for (int64_t i = 0; i < count; ++i) {
          out[i] = Element::store(keyed::fma_rn(value_of(scale, code[i]), weight, Element::load(out[i])));
        }
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = Element::store(value_of(scale, code[i]) * weight);
      }
    }
  });
}

bool has_code(int bits, int64_t bucket) {
  return bits >= 2 && bits <= 8 && bucket >= kGroup && bucket <= kMostBucket && bucket % kGroup == 0;
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_quantize_version() { return DS_EFFICIENT_LGRECO_QUANTIZE_VERSION; }

int ds_efficient_lgreco_quantize(const void* x, int64_t n, uint64_t key, int bits, int64_t bucket, void* payload,
                                 int dtype, int threads) {
  if (!has_code(bits, bucket)) return kUnknown;
  uint8_t* const out = static_cast<uint8_t*>(payload);
  switch (dtype) {
    case kFloat32: quantize<Float32>(x, n, key, bits, bucket, out, threads); return kDone;
    case kBfloat16: quantize<Bfloat16>(x, n, key, bits, bucket, out, threads); return kDone;
    case kFloat16: quantize<Float16>(x, n, key, bits, bucket, out, threads); return kDone;
    default: return kUnknown;
  }
}

int ds_efficient_lgreco_dequantize(const void* payload, int64_t n, int bits, int64_t bucket, double weight,
                                   int accumulate, void* out, int dtype, int threads) {
  if (!has_code(bits, bucket)) return kUnknown;
  const uint8_t* const in = static_cast<const uint8_t*>(payload);
  const float factor = static_cast<float>(weight);
  const bool add = accumulate != 0;
  switch (dtype) {
    case kFloat32: dequantize<Float32>(in, n, bits, bucket, factor, add, out, threads); return kDone;
    case kBfloat16: dequantize<Bfloat16>(in, n, bits, bucket, factor, add, out, threads); return kDone;
    case kFloat16: dequantize<Float16>(in, n, bits, bucket, factor, add, out, threads); return kDone;
    default: return kUnknown;
  }
}

}  // extern "C"
