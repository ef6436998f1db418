// Keyed random numbers on the CPU; C ABI, no torch headers. See csrc/common/keyed_random.h for the streams.
// Built with -fno-math-errno -fno-trapping-math, which let the loops vectorise and change no result.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "keyed_choice_cpu.h"
#include "keyed_random_lanes.h"
#include "parallel.h"

namespace {

using namespace ds_efficient::keyed;

constexpr int64_t kPerThread = 1 << 16;  // fewer elements than this are not worth a thread

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

template <typename T, typename Convert>
void fill(uint64_t key, uint64_t offset, int64_t n, void* out, int threads, Convert convert) {
  T* const target = static_cast<T*>(out);
  ds_efficient::run_parallel(n, kPerThread, threads, [=](int64_t first, int64_t count) {
    fill_range(key, offset + static_cast<uint64_t>(first), count, target + first, convert);
  });
}

}  // namespace

extern "C" {

int ds_efficient_keyed_random_version() { return DS_EFFICIENT_KEYED_RANDOM_VERSION; }

// Each returns 0, 1 for an unknown dtype, or 2 when memory runs out. `out` holds n elements; `offset` is the index of the first one.
int ds_efficient_keyed_bits(uint64_t key, uint64_t offset, int64_t n, void* out, int threads) {
  fill<uint32_t>(key, offset, n, out, threads, [](uint32_t w) { return w; });
  return 0;
}

int ds_efficient_keyed_uniform(uint64_t key, uint64_t offset, int64_t n, void* out, int dtype, int threads) {
  if (dtype == kFloat32) {
    fill<float>(key, offset, n, out, threads, [](uint32_t w) { return uniform_from_word(w); });
  } else if (dtype == kBfloat16) {
    fill<uint16_t>(key, offset, n, out, threads,
                   [](uint32_t w) { return below_one(bfloat16_bits(uniform_from_word(w)), kOneBfloat16); });
  } else if (dtype == kFloat16) {
    fill<uint16_t>(key, offset, n, out, threads,
                   [](uint32_t w) { return below_one(float16_bits(uniform_from_word(w)), kOneFloat16); });
  } else {
    return 1;
  }
  return 0;
}

int ds_efficient_keyed_normal(uint64_t key, uint64_t offset, int64_t n, void* out, int dtype, int threads) {
  if (dtype == kFloat32) {
    fill<float>(key, offset, n, out, threads, [](uint32_t w) { return normal_from_word(w); });
  } else if (dtype == kBfloat16) {
    fill<uint16_t>(key, offset, n, out, threads, [](uint32_t w) { return bfloat16_bits(normal_from_word(w)); });
  } else if (dtype == kFloat16) {
    fill<uint16_t>(key, offset, n, out, threads, [](uint32_t w) { return float16_bits(normal_from_word(w)); });
  } else {
    return 1;
  }
  return 0;
}

// out (batch, k): row r holds the choice of k of n that belongs to row number first_row + r.
int ds_efficient_keyed_choice(uint64_t key, uint64_t first_row, int64_t batch, int64_t n, int64_t k, int64_t* out,
                              int threads) {
  if (k == 0) return 0;
  std::atomic<int> status{0};
  const int64_t grain = std::max<int64_t>(1, kPerThread / 4 / n);
  ds_efficient::run_parallel(batch, grain, threads, [=, &status](int64_t first, int64_t count) {
    try {
      std::vector<uint64_t> rank(static_cast<size_t>(n)), scratch;
      for (int64_t r = first; r < first + count; ++r) {
        choose_row(key, first_row + static_cast<uint64_t>(r), n, k, out + r * k, rank, scratch);
      }
    } catch (const std::bad_alloc&) {
      status = 2;
    }
  });
  return status;
}

}  // extern "C"
