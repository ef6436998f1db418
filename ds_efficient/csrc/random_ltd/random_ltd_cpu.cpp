// Token dropping on the CPU: keyed choices of all layers, and copies of rows. C ABI, no torch headers.
//
// A hidden state is batch x length rows of `row` bytes that lie anywhere (Rows); index (batch, keep) names the kept
// positions of each sample, ascending within [0, length): the caller has checked it.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "keyed_choice_cpu.h"
#include "parallel.h"

#define DS_EFFICIENT_RANDOM_LTD_VERSION 1

namespace {

namespace keyed = ds_efficient::keyed;

constexpr int64_t kWordsPerThread = 1 << 14;   // fewer rank words than this are not worth a thread
constexpr int64_t kBytesPerThread = 1 << 18;  // nor fewer bytes

struct Rows {
  char* data;                // null: zeros
  int64_t sample, position;  // bytes from one to the next

  char* at(int64_t s, int64_t p) const { return data + s * sample + p * position; }
};

struct Kept {
  const int64_t* index;  // (batch, keep)
  int64_t batch, length, keep;
};

int64_t grain_of(int64_t row) { return std::max<int64_t>(1, kBytesPerThread / row); }

// visit(sample, position, slot) for all slots.
template <typename Visit>
void for_kept(const Kept& kept, int64_t row, int threads, Visit visit) {
  ds_efficient::run_parallel(kept.batch * kept.keep, grain_of(row), threads, [=](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) visit(i / kept.keep, kept.index[i], i % kept.keep);
  });
}

// visit(sample, position, slot) for all positions, with slot -1 for those that are not kept.
template <typename Visit>
void for_positions(const Kept& kept, int64_t row, int threads, Visit visit) {
  ds_efficient::run_parallel(kept.batch * kept.length, grain_of(row), threads, [=](int64_t first, int64_t count) {
    int64_t sample = first / kept.length, position = first % kept.length;
    const int64_t* index = kept.index + sample * kept.keep;
    int64_t slot = std::lower_bound(index, index + kept.keep, position) - index;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_kept = slot < kept.keep && index[slot] == position;
      visit(sample, position, is_kept ? slot : -1);
      slot += is_kept;
      if (++position == kept.length) {
        position = slot = 0;
        ++sample;
        index += kept.keep;
      }
    }
  });
}

void copy_row(char* to, const char* from, int64_t row) {
  if (from) {
    std::memcpy(to, from, static_cast<size_t>(row));
  } else {
    std::memset(to, 0, static_cast<size_t>(row));
  }
}

}  // namespace

extern "C" {

int ds_efficient_random_ltd_version() { return DS_EFFICIENT_RANDOM_LTD_VERSION; }

// Each returns 0, or 2 when memory runs out. No size is 0 but keep in scatter and split; keep <= length < 2^31.

// out (layers, batch, keep): sorted choices of keep of length, one key a layer.
int ds_efficient_ltd_sample(const uint64_t* keys, int64_t layers, int64_t batch, int64_t length, int64_t keep,
                            int64_t* out, int threads) {
  std::atomic<int> status{0};
  const int64_t grain = std::max<int64_t>(1, kWordsPerThread / length);
  ds_efficient::run_parallel(layers * batch, grain, threads, [=, &status](int64_t first, int64_t count) {
    try {
      std::vector<uint64_t> rank(static_cast<size_t>(length)), scratch;
      for (int64_t r = first; r < first + count; ++r) {
        keyed::choose_row(keys[r / batch], static_cast<uint64_t>(r % batch), length, keep, out + r * keep, rank,
                          scratch);
      }
    } catch (const std::bad_alloc&) {
      status = 2;
    }
  });
  return status;
}

// part <- rows of x at index.
int ds_efficient_ltd_gather(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                            int64_t x_sample, int64_t x_position, void* part, int64_t part_sample,
                            int64_t part_position, int threads) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  for_kept(Kept{index, batch, length, keep}, row, threads, [=](int64_t sample, int64_t position, int64_t slot) {
    copy_row(few.at(sample, slot), all.at(sample, position), row);
  });
  return 0;
}

// Rows of x at index <- part.
int ds_efficient_ltd_put(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                         int64_t x_sample, int64_t x_position, void* part, int64_t part_sample, int64_t part_position,
                         int threads) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  for_kept(Kept{index, batch, length, keep}, row, threads, [=](int64_t sample, int64_t position, int64_t slot) {
    copy_row(all.at(sample, position), few.at(sample, slot), row);
  });
  return 0;
}

// out <- part at index, rest elsewhere; either may be null: zeros.
int ds_efficient_ltd_scatter(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* rest,
                             int64_t rest_sample, int64_t rest_position, void* part, int64_t part_sample,
                             int64_t part_position, void* out, int64_t out_sample, int64_t out_position, int threads) {
  const Rows all{static_cast<char*>(rest), rest_sample, rest_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Rows made{static_cast<char*>(out), out_sample, out_position};
  for_positions(Kept{index, batch, length, keep}, row, threads, [=](int64_t sample, int64_t position, int64_t slot) {
    const Rows& source = slot < 0 ? all : few;
    copy_row(made.at(sample, position), source.data ? source.at(sample, slot < 0 ? position : slot) : nullptr, row);
  });
  return 0;
}

// out <- x with zeros at index, part <- rows of x at index.
int ds_efficient_ltd_split(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                           int64_t x_sample, int64_t x_position, void* part, int64_t part_sample, int64_t part_position,
                           void* out, int64_t out_sample, int64_t out_position, int threads) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Rows made{static_cast<char*>(out), out_sample, out_position};
  for_positions(Kept{index, batch, length, keep}, row, threads, [=](int64_t sample, int64_t position, int64_t slot) {
    const char* const source = all.at(sample, position);
    if (slot >= 0) copy_row(few.at(sample, slot), source, row);
    copy_row(made.at(sample, position), slot < 0 ? source : nullptr, row);
  });
  return 0;
}

}  // extern "C"
