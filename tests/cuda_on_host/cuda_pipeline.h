// Asynchronous copies to shared memory; see cuda_runtime.h. A copy is done where its group is waited for, as late as
// the device may do it, so that a kernel that reads too early finds old data.
#pragma once
#include "cuda_runtime.h"

// The last `zeros` of the `bytes` are filled with 0, and as many are not read.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  host::check_alignment(to, bytes);
  host::check_alignment(from, bytes);
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zeros > bytes) host::fail("no such asynchronous copy");
  host::fibers[threadIdx.x].open.push_back(host::Copy{to, from, bytes, zeros});
}

inline void __pipeline_commit() {
  host::Fiber& me = host::fibers[threadIdx.x];
  me.committed.push_back(std::move(me.open));
  me.open.clear();
}

inline void __pipeline_wait_prior(size_t newest) {
  std::deque<std::vector<host::Copy>>& groups = host::fibers[threadIdx.x].committed;
  for (; groups.size() > newest; groups.pop_front()) {
    for (const host::Copy& copy : groups.front()) {
      memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      memset(static_cast<char*>(copy.to) + (copy.bytes - copy.zeros), 0, copy.zeros);
    }
  }
}
