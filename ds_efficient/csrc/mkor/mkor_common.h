// The grouped rank-1 update of inverse Kronecker factors (MKOR, arXiv 2306.01685, equation corrected): what the C++ and
// the CUDA code share.
//
// A factor is a symmetric positive definite d x d matrix M, row by row without gaps, in float32, bfloat16 or float16; v
// is its float32 vector; `largest` is max |M| as it is when the call begins. One call does for every factor
//
//   M <- zeta M + (1 - zeta) I                       where largest > threshold
//   u = M v,  q = v^T u
//   M <- (M - c u u^T) / gamma,                      c = (1 - gamma) / (gamma + (1 - gamma) q), but see below
//   largest <- max |M|, of the stored numbers
//
// so that M stays the inverse of gamma F + (1 - gamma) v v^T (Sherman and Morrison). The blend is part of both passes
// over M, so it costs no memory traffic. Products are float32 sums of at most some hundred terms, added up in float64;
// q and what follows from it is float64; the vector that is subtracted is scaled to sqrt(c / gamma) u before it is
// rounded, so that nothing overflows where M and v are finite. Sums have a fixed order: equal bits in every run.
//
// Definiteness. c is at most what leaves v^T M v >= 32 epsilon of the stored type times max |M| |v|^2: an exact update
// with a long v would shrink M along v to less than rounding adds. Where rounding to a half type has cost M its
// definiteness nevertheless, seen by v^T M v < 0, it starts again from the identity, outcome kReset. A factor is left
// as it is, outcome kLeft, where v is not finite or max |M| |v| > 1e35, where M v is not finite, and where M / gamma
// might overflow.
#pragma once

#include <cmath>
#include <cstdint>

#include "keyed_random.h"

#define DS_EFFICIENT_MKOR_VERSION 2

namespace ds_efficient {
namespace mkor {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum Outcome { kUpdated = 0, kBlended = 1, kLeft = 2, kReset = 3 };

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DS_EFFICIENT_HD float to_float(float value) { return value; }
DS_EFFICIENT_HD float to_float(Bfloat16 value) {
  return keyed::float_of(static_cast<int32_t>(static_cast<uint32_t>(value.bits) << 16));
}

DS_EFFICIENT_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return keyed::float_of(static_cast<int32_t>(sign | 0x7f800000u | (rest & 0x3ffu) << 13));
  const float magnitude = keyed::float_of(static_cast<int32_t>(rest << 13)) * 0x1p112f;
  return sign ? -magnitude : magnitude;
#endif
}

// Nearest number of a type, ties to even; the value is finite, and in float16 becomes at most the largest number.
template <typename T>
DS_EFFICIENT_HD T round_to(float value);
template <>
DS_EFFICIENT_HD float round_to<float>(float value) {
  return value;
}
template <>
DS_EFFICIENT_HD Bfloat16 round_to<Bfloat16>(float value) {
#if defined(__CUDA_ARCH__)
  Bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return Bfloat16{keyed::bfloat16_bits(value)};
#endif
}
template <>
DS_EFFICIENT_HD Float16 round_to<Float16>(float value) {
  const float bounded = value > 65503.0f ? 65503.0f : value < -65503.0f ? -65503.0f : value;
#if defined(__CUDA_ARCH__)
  Float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(bounded));
  return result;
#else
  return Float16{keyed::float16_bits(bounded)};
#endif
}

// Rounding and range of a stored type.
struct Limits {
  double epsilon, most;
};
template <typename T>
DS_EFFICIENT_HD Limits limits_of();
template <>
DS_EFFICIENT_HD Limits limits_of<float>() {
  return Limits{0x1p-23, 0x1.fffffep127};
}
template <>
DS_EFFICIENT_HD Limits limits_of<Bfloat16>() {
  return Limits{0x1p-7, 0x1.fep127};
}
template <>
DS_EFFICIENT_HD Limits limits_of<Float16>() {
  return Limits{0x1p-10, 65504.0};
}

struct Rule {
  double gamma, threshold, zeta;
};

DS_EFFICIENT_HD bool blends(const Rule& rule, float largest) { return static_cast<double>(largest) > rule.threshold; }

// An element of u from that of M v, M as it is stored.
DS_EFFICIENT_HD float blended_product(const Rule& rule, bool blend, double product, float v) {
  return static_cast<float>(blend ? rule.zeta * product + (1.0 - rule.zeta) * v : product);
}

// M <- scale M + shift I - w w^T, w = factor u.
struct Step {
  float scale, shift;
  double factor;
  int outcome;
};

// q: v^T M v after the blend; square: v^T v.
DS_EFFICIENT_HD Step decide(const Rule& rule, const Limits& limits, float largest, double q, double square) {
  const bool blend = blends(rule, largest);
  const double keep = blend ? rule.zeta : 1.0, add = blend ? 1.0 - rule.zeta : 0.0;
  // No element of M exceeds the bound: the diagonal of a positive definite matrix holds its largest one.
  const double bound = keep * static_cast<double>(largest) + add;
  const bool sound = q >= -1.7e308 && q <= 1.7e308 && sqrt(square) * bound <= 1e35 && bound / rule.gamma <= limits.most;
  if (!sound) return Step{1.0f, 0.0f, 0.0, kLeft};  // so it is for NaN
  if (q < 0.0) return Step{0.0f, 1.0f, 0.0, kReset};
  const double floor = rule.gamma * 32.0 * limits.epsilon * bound * square;
  double weight = 0.0;
  if (q > floor) {
    const double most = (q - floor) / (q * q), wanted = (1.0 - rule.gamma) / (rule.gamma + (1.0 - rule.gamma) * q);
    weight = most < wanted ? most : wanted;
  }
  return Step{static_cast<float>(keep / rule.gamma), static_cast<float>(add / rule.gamma), sqrt(weight / rule.gamma),
              blend ? kBlended : kUpdated};
}

// The same for (row, column) and (column, row), bit for bit.
DS_EFFICIENT_HD float updated(float m, float scale, float shift, float row_w, float column_w) {
  return keyed::fma_rn(-row_w, column_w, keyed::fma_rn(scale, m, shift));
}

}  // namespace mkor
}  // namespace ds_efficient
