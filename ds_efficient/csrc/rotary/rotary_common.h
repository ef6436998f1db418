// Rotary position embedding: what the host and the kernels share.
//
// t is positions x samples x heads x width elements with any strides but the last, which is 1; out is the same without
// gaps. The first `rotated` channels of every head are turned by the angles of the token's position:
//
//   out[j]        = t[j]        cos(a[j])        - t[j + half] sin(a[j])              half = rotated / 2, j < half
//   out[j + half] = t[j + half] cos(a[j + half]) + t[j]        sin(a[j + half])
//
// and the rest is copied. That is a product with a matrix; `transposed` takes its transpose, the gradient. For both,
// out[j] = t[j] cosine[j] + t[partner of j] coupling[j], where coupling holds the sines with their signs. Sines and
// cosines, products and sums are float32, of float64 elements float64; the result is rounded once.
//
// Angles are float32 and may differ between samples. index (samples, positions) names the row of angles of each token;
// null: the rows in order.
#pragma once

#include <cstdint>

#include "keyed_random.h"

namespace ds_efficient {
namespace rotary {

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct Job {
  const void* t;
  int64_t t_position, t_sample, t_head;  // elements from one to the next
  void* out;
  const float* angles;
  int64_t angle_position, angle_sample;  // elements from one to the next
  const int64_t* index;
  int64_t length;  // rows of angles
  int64_t positions, samples, heads, width, rotated;
  double scale;  // of cosines and sines
  bool transposed;
};

// Where the coupling of channel j goes: to its own place, or in the transpose to that of its partner.
DS_EFFICIENT_HD int64_t coupling_at(int64_t j, int64_t rotated, bool transposed) {
  const int64_t half = rotated / 2;
  return !transposed ? j : j < half ? j + half : j - half;
}

}  // namespace rotary
}  // namespace ds_efficient
