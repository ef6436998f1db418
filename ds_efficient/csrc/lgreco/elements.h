// Elements of gradients as they are stored, read as float32, for the host and for kernels; numbers that are not finite.
#pragma once

#include <cstdint>

#include "keyed_random.h"

namespace ds_efficient {
namespace lgreco {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

DS_EFFICIENT_HD float not_a_number() { return keyed::float_of(0x7fc00000); }

DS_EFFICIENT_HD uint16_t bfloat16_of(float value) {
  return value == value ? keyed::bfloat16_bits(value) : static_cast<uint16_t>(0x7fc0);
}

DS_EFFICIENT_HD float float_of_bfloat16(uint16_t bits) {
  return keyed::float_of(static_cast<int32_t>(static_cast<uint32_t>(bits) << 16));
}

// What a compressor with error feedback compresses, rounded once. `error` is kNoError where there is none, which leaves
// the bits of value * unscale.
constexpr float kNoError = -0.0f;
DS_EFFICIENT_HD float corrected(float value, float unscale, float error) { return keyed::fma_rn(value, unscale, error); }

}  // namespace lgreco
}  // namespace ds_efficient
