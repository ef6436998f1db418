// Share a loop among threads of the host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace ds_efficient {

// Run work(first, count) over [0, n) on up to `threads` threads, each with at least `grain` elements; where the
// system grants no more threads, here.
template <typename Work>
void run_parallel(int64_t n, int64_t grain, int threads, Work work) {
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(threads, n / std::max<int64_t>(1, grain)));
  const int64_t share = (n + wanted - 1) / wanted;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < wanted; ++i) {
    const int64_t first = std::min(n, i * share), count = std::min(share, n - first);
    try {
      others.emplace_back([=] { work(first, count); });
    } catch (const std::system_error&) {
      work(first, count);
    }
  }
  work(0, std::min(share, n));
  for (auto& other : others) other.join();
}

}  // namespace ds_efficient
