// Elements of gradients on the host; plain code, so that loops over them vectorise.
#pragma once

#include <cstdint>

#include "elements.h"

namespace ds_efficient {
namespace lgreco {

enum Status { kDone = 0, kUnknown = 1, kNoMemory = 2 };

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

// work.run<Element>() for the element type of a dtype.
template <typename Work>
int with_element(const Work& work, int dtype) {
  switch (dtype) {
    case kFloat32: return work.template run<Float32>();
    case kBfloat16: return work.template run<Bfloat16>();
    case kFloat16: return work.template run<Float16>();
    default: return kUnknown;
  }
}

}  // namespace lgreco
}  // namespace ds_efficient
