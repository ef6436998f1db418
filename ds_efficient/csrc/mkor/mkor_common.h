// The grouped rank-1 update of inverse Kronecker factors (MKOR, arXiv 2306.01685, equation corrected): what the C++ and
// the CUDA code share.
//
// A factor is a symmetric positive definite d x d matrix M, row by row without gaps, in float32 or bfloat16; v is its
// float32 vector; `largest` is max |M| as it is when the call begins. One call does for every factor
//
//   M <- zeta M + (1 - zeta) I                       where largest > threshold
//   u = M v,  q = v^T u
//   M <- (M - (1 - gamma) / (gamma + (1 - gamma) q) u u^T) / gamma
//   largest <- max |M|, of the stored numbers
//
// so that M stays the inverse of gamma F + (1 - gamma) v v^T (Sherman and Morrison). The blend is part of both passes
// over M, so it costs no memory traffic. Products are float32 sums of at most some hundred terms, added up in float64;
// q and what follows from it is float64; the vector that is subtracted is scaled to sqrt((1 - gamma) / ...) u before it
// is rounded, so that nothing overflows where M and v are finite. Sums have a fixed order: equal bits in every run.
//
// A factor is left as it is, outcome kLeft, where u or v is not finite, where gamma + (1 - gamma) q <= 0 (M is not
// positive definite any more) and where M / gamma might overflow.
#pragma once

#include <cmath>
#include <cstdint>

#include "keyed_random.h"

#define DS_EFFICIENT_MKOR_VERSION 1

namespace ds_efficient {
namespace mkor {

enum Dtype { kFloat32 = 0, kBfloat16 = 1 };
enum Outcome { kUpdated = 0, kBlended = 1, kLeft = 2 };

struct Bfloat16 {
  uint16_t bits;
};

DS_EFFICIENT_HD float to_float(float value) { return value; }
DS_EFFICIENT_HD float to_float(Bfloat16 value) {
  return keyed::float_of(static_cast<int32_t>(static_cast<uint32_t>(value.bits) << 16));
}

// Nearest number of a type, ties to even; the value is finite.
template <typename T>
DS_EFFICIENT_HD T round_to(float value);
template <>
DS_EFFICIENT_HD float round_to<float>(float value) {
  return value;
}
template <>
DS_EFFICIENT_HD Bfloat16 round_to<Bfloat16>(float value) {
  return Bfloat16{keyed::bfloat16_bits(value)};
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

DS_EFFICIENT_HD Step decide(const Rule& rule, float largest, double q) {
  const bool blend = blends(rule, largest);
  const double keep = blend ? rule.zeta : 1.0, add = blend ? 1.0 - rule.zeta : 0.0;
  const double denominator = rule.gamma + (1.0 - rule.gamma) * q;
  // No element of the new M exceeds the bound: the diagonal of a positive definite matrix holds its largest one.
  const double bound = (keep * static_cast<double>(largest) + add) / rule.gamma;
  const bool sound = denominator > 0.0 && denominator <= 1.7e308 && bound <= 3.38e38;  // false for NaN
  Step step;
  step.scale = static_cast<float>(keep / rule.gamma);
  step.shift = static_cast<float>(add / rule.gamma);
  step.factor = sound ? sqrt((1.0 - rule.gamma) / (rule.gamma * denominator)) : 0.0;
  step.outcome = !sound ? kLeft : blend ? kBlended : kUpdated;
  return step;
}

// The same for (row, column) and (column, row), bit for bit.
DS_EFFICIENT_HD float updated(float m, float scale, float shift, float row_w, float column_w) {
  return keyed::fma_rn(-row_w, column_w, keyed::fma_rn(scale, m, shift));
}

}  // namespace mkor
}  // namespace ds_efficient
