// Atomic operations; see cuda_runtime.h. Threads are fibers, so plain code is atomic.
#pragma once

inline int atomicMax(int* place, int value) {
  const int before = *place;
  if (value > before) *place = value;
  return before;
}
