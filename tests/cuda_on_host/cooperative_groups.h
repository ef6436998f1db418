// The barrier of a grid, of CUDA's cooperative groups, on the host.
#pragma once
#include <cuda_runtime.h>

namespace cooperative_groups {

struct grid_group {
  void sync() const {
    __syncthreads();
    if (threadIdx.x == 0) host::grid.wait();
    __syncthreads();
  }
};

inline grid_group this_grid() { return grid_group{}; }

}  // namespace cooperative_groups
