// csrc/common/tensor_core.h on the host: the same functions with the layouts of the PTX manual, warps in step.
#pragma once
#include <cstdint>
#include <cstring>

#include "cuda_pipeline.h"
#include "cuda_runtime.h"

namespace ds_efficient {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(Bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float to_float(Float16 value) {
  _Float16 half;
  memcpy(&half, &value.bits, sizeof half);
  return static_cast<float>(half);
}

template <typename T>
T round_to(float value);
template <>
inline float round_to<float>(float value) {
  return value;
}
template <>
inline Bfloat16 round_to<Bfloat16>(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return Bfloat16{0x7fff};
  return Bfloat16{static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 round_to<Float16>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Float16 made;
  memcpy(&made.bits, &half, sizeof half);
  return made;
}

inline char* dynamic_shared() { return host::dynamic_memory(); }

inline void copy_async(void* shared, const void* global, int bytes) {
  __pipeline_memcpy_async(shared, global, 16, 16 - static_cast<size_t>(bytes));
}

inline void load_matrices_transposed(uint32_t (&part)[4], const void* row) {
  host::check_alignment(row, 16);
  const host::Exchange* const all = host::exchange(&row, sizeof row);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    uint16_t two[2];
    for (int e = 0; e < 2; ++e) {
      const char* from;
      memcpy(&from, all[8 * i + 2 * (lane % 4) + e].bytes, sizeof from);
      memcpy(&two[e], from + lane / 4 * 2, 2);
    }
    memcpy(&part[i], two, sizeof two);
  }
}

template <typename T>
float element_of(uint32_t pair, int which) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * which))});
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const host::Exchange* const all = host::exchange(mine, sizeof mine);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      uint32_t left[6], right[6];
      memcpy(left, all[row % 8 * 4 + k % 8 / 2].bytes, sizeof left);
      memcpy(right, all[column * 4 + k % 8 / 2].bytes, sizeof right);
      sum[i] += element_of<T>(left[row / 8 + k / 8 * 2], k % 2) * element_of<T>(right[4 + k / 8], k % 2);
    }
  }
}

}  // namespace ds_efficient
