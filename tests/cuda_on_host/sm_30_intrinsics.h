// Exchange within a warp; see cuda_runtime.h.
#pragma once
#include "cuda_runtime.h"

inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int mask) {
  const host::Exchange* const all = host::exchange(&value, sizeof value);
  memcpy(&value, all[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)].bytes, sizeof value);
  return value;
}

inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane) {
  const host::Exchange* const all = host::exchange(&value, sizeof value);
  memcpy(&value, all[lane % 32].bytes, sizeof value);
  return value;
}
