// Element types on the host: how they are stored, the type of the arithmetic, and conversions; plain code, so that loops
// over them vectorise.
#pragma once

#include <cstdint>

#include "keyed_random.h"

namespace ds_efficient {

// load and store: any number, to the nearest, ties to even. round: of a float32 number, |value| < 65504, to those that
// are stored.

inline float float_of_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7fffu;
  const float subnormal = keyed::float_of(static_cast<int32_t>(0x3f000000u + magnitude)) - 0.5f;  // units of 2^-24
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t value = magnitude < 0x400u ? static_cast<uint32_t>(keyed::bits_of(subnormal)) : normal;
  return keyed::float_of(static_cast<int32_t>(value | (bits & 0x8000u) << 16));
}

// Stored as it is in the arithmetic.
template <typename T>
struct Unchanged {
  using Stored = T;
  using Wide = T;
  static T load(T value) { return value; }
  static T store(T value) { return value; }
  static float round(float value) { return value; }
};

using Float32 = Unchanged<float>;
using Float64 = Unchanged<double>;

struct Bfloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static float load(uint16_t bits) { return keyed::float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16)); }
  static uint16_t store(float value) { return value == value ? keyed::bfloat16_bits(value) : 0x7fc0; }
  static float round(float value) { return load(keyed::bfloat16_bits(value)); }
};

struct Float16 {
  using Stored = uint16_t;
  using Wide = float;
  static float load(uint16_t bits) { return float_of_float16(bits); }
  static uint16_t store(float value) {
    if (value != value) return 0x7e00;
    const uint16_t sign = value < 0 ? 0x8000 : 0;
    return value >= 65520.0f || value <= -65520.0f ? static_cast<uint16_t>(sign | 0x7c00) : keyed::float16_bits(value);
  }
  static float round(float value) { return float_of_float16(keyed::float16_bits(value)); }
};

}  // namespace ds_efficient
