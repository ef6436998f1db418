// Token dropping on CUDA devices: keyed choices of all layers in one launch, and copies of rows. C ABI, no torch
// headers.
//
// A hidden state is batch x length rows of `row` bytes that lie anywhere (Rows); index (batch, keep) names the kept
// positions of each sample, ascending. Rows are copied in the widest words that all addresses allow, 16 bytes as a
// rule. An index that does not ascend within [0, length) stops the kernel, as torch's own gathers do.
//
// A kernel takes some tens of microseconds, of which its start is a good part. So each is brought to the device while
// the one before, whatever that is, still runs (launch.h), and waits for it before anything else: indices may be the
// work of the kernel before, and a result may lie where it reads. Hence no __ldg, which could move ahead of the wait.
#include <cuda_runtime.h>

#include <cstdint>

#include "keyed_choice_cuda.h"
#include "launch.h"

#define DS_EFFICIENT_RANDOM_LTD_VERSION 1

namespace {

namespace keyed = ds_efficient::keyed;
namespace launches = ds_efficient::launches;

// ---- copies of rows --------------------------------------------------------------------------------------------

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kKeptAhead = 2, kTileAhead = 8;       // loads of a thread before its first store
constexpr int64_t kTileBytes = 32768, kMostBlocks = 0x7fffffff;
constexpr uint32_t kLeastTile = 4, kMostTile = 256;  // positions of a tile; at most one a thread
constexpr uint32_t kDropped = 0xffffffffu;

struct Rows {
  char* data;                // null: zeros
  int64_t sample, position;  // bytes from one to the next
};

struct Kept {
  const int64_t* index;  // (batch, keep)
  int64_t batch, length, keep;
};

// How a warp shares rows of `words` words: 2^shift lanes a row, each kAhead words of one of `segments` segments.
template <int kAhead>
struct Share {
  uint32_t words, segments;
  int shift;

  explicit Share(int64_t row_words) : words(static_cast<uint32_t>(row_words)), shift(0) {
    while (shift < 5 && (int64_t{kAhead} << shift) < row_words) ++shift;
    const uint32_t segment = static_cast<uint32_t>(kAhead) << shift;
    segments = (words + segment - 1) / segment;
  }
  // Row and first word of this lane in a task of its warp.
  __device__ __forceinline__ uint32_t row(uint32_t task) const {
    return ((task / segments) << (5 - shift)) + ((threadIdx.x % 32) >> shift);
  }
  __device__ __forceinline__ uint32_t word(uint32_t task) const {
    const uint32_t lane = (threadIdx.x % 32) & ((1u << shift) - 1u);
    return ((task % segments) * kAhead << shift) + lane;
  }
};

// Which part of which sample a block takes. Where samples lie side by side at each position, so do their blocks: what
// runs at a time is then close together in memory.
struct Grid {
  uint32_t parts, batch;
  bool samples_side_by_side;

  __device__ __forceinline__ uint32_t sample() const {
    return samples_side_by_side ? blockIdx.x % batch : blockIdx.x / parts;
  }
  __device__ __forceinline__ uint32_t part() const {
    return samples_side_by_side ? blockIdx.x / batch : blockIdx.x % parts;
  }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t sample, int64_t position) {
  return reinterpret_cast<const T*>(rows.data + sample * rows.sample + position * rows.position);
}

template <typename T>
__device__ __forceinline__ T* row_to(const Rows& rows, int64_t sample, int64_t position) {
  return reinterpret_cast<T*>(rows.data + sample * rows.sample + position * rows.position);
}

// The words of one segment of a row that belong to this lane.
template <typename T, int kAhead>
struct Words {
  T value[kAhead];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) value[i] = T{};
  }
  __device__ __forceinline__ void load(const T* row, uint32_t first, const Share<kAhead>& share) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t word = first + (static_cast<uint32_t>(i) << share.shift);
      if (word < share.words) value[i] = row[word];
    }
  }
  __device__ __forceinline__ void store(T* row, uint32_t first, const Share<kAhead>& share) const {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint32_t word = first + (static_cast<uint32_t>(i) << share.shift);
      if (word < share.words) row[word] = value[i];
    }
  }
};

// Position of a slot; stops where it is not one, or not behind that of the slot before.
__device__ __forceinline__ int64_t checked_position(const int64_t* index, uint32_t slot, int64_t length) {
  const int64_t position = index[slot], before = slot ? index[slot - 1] : -1;
  if (position < 0 || position >= length || position <= before) __trap();
  return position;
}

// part <- the kept rows of all, or with kPut the kept rows of all <- part. A warp takes one segment, or several short
// rows.
template <typename T, bool kPut>
__global__ void __launch_bounds__(kThreads)
    kept_kernel(const Rows all, const Rows part, const Kept kept, const Share<kKeptAhead> share, const Grid grid) {
  launches::wait_for_previous();
  const uint32_t sample = grid.sample();
  const uint32_t task = grid.part() * kWarps + threadIdx.x / 32;
  const uint32_t slot = share.row(task);
  if (slot >= kept.keep) return;
  const int64_t position = checked_position(kept.index + sample * kept.keep, slot, kept.length);
  const uint32_t first = share.word(task);
  Words<T, kKeptAhead> words;
  if (kPut) {
    words.load(row_of<T>(part, sample, slot), first, share);
    words.store(row_to<T>(all, sample, position), first, share);
  } else {
    words.load(row_of<T>(all, sample, position), first, share);
    words.store(row_to<T>(part, sample, slot), first, share);
  }
}

// The first slot whose position is not below `start`; the 32 lanes of a warp look at 32 slots at a time.
__device__ __forceinline__ uint32_t first_slot_from(const int64_t* index, uint32_t keep, int64_t start) {
  uint32_t low = 0, count = keep;
  while (count > 0) {
    const uint32_t step = count / 33 + 1, slot = threadIdx.x % 32 * step + step - 1;
    const bool below = slot < count && index[low + slot] < start;
    const uint32_t passed = static_cast<uint32_t>(__popc(__ballot_sync(0xffffffffu, below)));
    low += passed * step;
    const uint32_t left = count - passed * step;
    count = left < step ? left : step - 1;
  }
  return low;
}

// Fill slots[i] with the slot of position start + i, or kDropped. All threads of the block call it.
__device__ __forceinline__ void find_slots(const int64_t* index, const Kept& kept, int64_t start, uint32_t size,
                                           uint32_t* slots, uint32_t* first) {
  const uint32_t keep = static_cast<uint32_t>(kept.keep);
  if (threadIdx.x < size) slots[threadIdx.x] = kDropped;
  if (threadIdx.x < 32) {
    const uint32_t found = first_slot_from(index, keep, start);
    if (threadIdx.x == 0) *first = found;
  }
  __syncthreads();
  const uint32_t slot = *first + threadIdx.x;
  if (threadIdx.x < size && slot < keep) {
    const int64_t offset = index[slot] - start;
    if (offset >= 0 && offset < size) slots[offset] = slot;
  }
  __syncthreads();
}

// One tile of consecutive positions a block. Without kSplit: out <- part at the kept positions, rest elsewhere, where
// no data mean zeros. With kSplit: rest is read; out <- rest with zeros at the kept positions, part <- rest there.
template <typename T, bool kSplit>
__global__ void __launch_bounds__(kThreads)
    tile_kernel(const Rows rest, const Rows part, const Rows out, const Kept kept, const Share<kTileAhead> share,
                uint32_t size, const Grid grid) {
  __shared__ uint32_t slots[kMostTile];
  __shared__ uint32_t first_slot;
  launches::wait_for_previous();
  const uint32_t sample = grid.sample(), tile = grid.part();
  const int64_t* const index = kept.index + sample * kept.keep;
  const int64_t start = int64_t{tile} * size, left = kept.length - start;
  const uint32_t rows = left < size ? static_cast<uint32_t>(left) : size;
  // keep <= length, so that the tiles together check every slot.
  const int64_t checked = start + threadIdx.x;
  if (threadIdx.x < size && checked < kept.keep) {
    checked_position(index, static_cast<uint32_t>(checked), kept.length);
  }
  find_slots(index, kept, start, size, slots, &first_slot);
  for (uint32_t task = threadIdx.x / 32;; task += kWarps) {
    if ((task / share.segments) << (5 - share.shift) >= rows) break;
    const uint32_t row = share.row(task), first = share.word(task);
    if (row >= rows) continue;
    const uint32_t slot = slots[row];
    const bool is_kept = slot != kDropped;
    Words<T, kTileAhead> words;
    words.clear();
    if (kSplit) {
      words.load(row_of<T>(rest, sample, start + row), first, share);
      if (is_kept) {
        words.store(row_to<T>(part, sample, slot), first, share);
        words.clear();
      }
    } else {
      const bool from_rest = !is_kept && rest.data, from_part = is_kept && part.data;
      const T* const source = from_part ? row_of<T>(part, sample, slot) : row_of<T>(rest, sample, start + row);
      if (from_rest || from_part) words.load(source, first, share);
    }
    words.store(row_to<T>(out, sample, start + row), first, share);
  }
}

uint64_t bits_of_address(const Rows& rows) {
  if (!rows.data) return 0;
  return reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.sample) |
         static_cast<uint64_t>(rows.position);
}

// The widest word, at most 16 bytes, that divides what `bits` collects.
int word_bytes(uint64_t bits) {
  for (int width = 16; width > 1; width /= 2) {
    if (bits % static_cast<uint64_t>(width) == 0) return width;
  }
  return 1;
}

// Start a kernel with a block for each of `parts` parts of each sample of `rows`.
template <typename Start>
cudaError_t start_blocks(int64_t parts, const Kept& kept, const Rows& rows, Start start) {
  if (parts * kept.batch > kMostBlocks) return cudaErrorInvalidConfiguration;
  const Grid grid{static_cast<uint32_t>(parts), static_cast<uint32_t>(kept.batch), rows.sample < rows.position};
  return start(parts * kept.batch, grid);
}

template <typename T, bool kPut>
cudaError_t copy_kept(const Rows& all, const Rows& part, const Kept& kept, int64_t words, int device,
                      cudaStream_t stream) {
  const Share<kKeptAhead> share(words);
  const int64_t rows_at_once = 32 >> share.shift;
  const int64_t tasks = (kept.keep + rows_at_once - 1) / rows_at_once * share.segments;
  return start_blocks((tasks + kWarps - 1) / kWarps, kept, all, [&](int64_t blocks, const Grid& grid) {
    return launches::launch_after<kept_kernel<T, kPut>>(blocks, kThreads, device, stream, all, part, kept, share, grid);
  });
}

template <typename T, bool kSplit>
cudaError_t copy_tiles(const Rows& rest, const Rows& part, const Rows& out, const Kept& kept, int64_t words,
                       int device, cudaStream_t stream) {
  const Share<kTileAhead> share(words);
  const int64_t row = words * static_cast<int64_t>(sizeof(T));
  uint32_t size = kLeastTile;
  while (size < kMostTile && 2 * size * row <= kTileBytes) size *= 2;
  return start_blocks((kept.length + size - 1) / size, kept, out, [&](int64_t blocks, const Grid& grid) {
    return launches::launch_after<tile_kernel<T, kSplit>>(blocks, kThreads, device, stream, rest, part, out, kept,
                                                          share, size, grid);
  });
}

// Calls run(T{}, words of a row) with the word type T that fits.
template <typename Run>
cudaError_t with_words(uint64_t bits, int64_t row, int device, Run run) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const int width = word_bytes(bits | static_cast<uint64_t>(row));
  const int64_t words = row / width;
  if (words >= kMostBlocks) return cudaErrorInvalidValue;
  switch (width) {
    case 16: return run(uint4{}, words);
    case 8: return run(uint2{}, words);
    case 4: return run(uint32_t{}, words);
    case 2: return run(uint16_t{}, words);
    default: return run(uint8_t{}, words);
  }
}

// ---- choices ---------------------------------------------------------------------------------------------------

constexpr int kKeys = 256;  // layers of one launch: the keys are a kernel parameter, at most 4 KB

struct Keys {
  uint64_t key[kKeys];
};

// Row layer * batch + sample of out is the choice of row number `sample` under the layer's key.
__global__ void __launch_bounds__(keyed::kRowThreads)
    sample_kernel(const Keys keys, int64_t batch, int64_t rows, uint32_t n, uint32_t k, int64_t* __restrict__ out) {
  __shared__ keyed::RowShared shared;
  launches::wait_for_previous();
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t layer = r / batch;
    keyed::choose_row(keys.key[layer], static_cast<uint64_t>(r - layer * batch), n, k, out + r * k, shared);
  }
}

}  // namespace

extern "C" {

int ds_efficient_random_ltd_version() { return DS_EFFICIENT_RANDOM_LTD_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Each returns a cudaError_t. No size is 0 but keep in scatter and split; keep <= length < 2^31.

// out (layers, batch, keep): sorted choices of keep of length, one key a layer; `keys` is read by the host.
int ds_efficient_ltd_sample(const uint64_t* keys, int64_t layers, int64_t batch, int64_t length, int64_t keep,
                            int64_t* out, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  for (int64_t first = 0; first < layers; first += kKeys) {
    const int64_t count = layers - first < kKeys ? layers - first : kKeys, rows = count * batch;
    Keys some{};
    for (int64_t i = 0; i < count; ++i) some.key[i] = keys[first + i];
    const int64_t blocks = rows < (1 << 20) ? rows : (1 << 20);
    const cudaError_t launched = launches::launch_after<sample_kernel>(
        blocks, keyed::kRowThreads, device, stream, some, batch, rows, static_cast<uint32_t>(length),
        static_cast<uint32_t>(keep), out + first * batch * keep);
    if (launched != cudaSuccess) return launched;
  }
  return cudaSuccess;
}

// part <- rows of x at index.
int ds_efficient_ltd_gather(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                            int64_t x_sample, int64_t x_position, void* part, int64_t part_sample,
                            int64_t part_position, int device, cudaStream_t stream) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Kept kept{index, batch, length, keep};
  return with_words(bits_of_address(all) | bits_of_address(few), row, device, [&](auto word, int64_t words) {
    return copy_kept<decltype(word), false>(all, few, kept, words, device, stream);
  });
}

// Rows of x at index <- part.
int ds_efficient_ltd_put(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                         int64_t x_sample, int64_t x_position, void* part, int64_t part_sample, int64_t part_position,
                         int device, cudaStream_t stream) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Kept kept{index, batch, length, keep};
  return with_words(bits_of_address(all) | bits_of_address(few), row, device, [&](auto word, int64_t words) {
    return copy_kept<decltype(word), true>(all, few, kept, words, device, stream);
  });
}

// out <- part at index, rest elsewhere; either may be null: zeros.
int ds_efficient_ltd_scatter(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* rest,
                             int64_t rest_sample, int64_t rest_position, void* part, int64_t part_sample,
                             int64_t part_position, void* out, int64_t out_sample, int64_t out_position, int device,
                             cudaStream_t stream) {
  const Rows all{static_cast<char*>(rest), rest_sample, rest_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Rows made{static_cast<char*>(out), out_sample, out_position};
  const Kept kept{index, batch, length, keep};
  const uint64_t bits = bits_of_address(all) | bits_of_address(few) | bits_of_address(made);
  return with_words(bits, row, device, [&](auto word, int64_t words) {
    return copy_tiles<decltype(word), false>(all, few, made, kept, words, device, stream);
  });
}

// out <- x with zeros at index, part <- rows of x at index.
int ds_efficient_ltd_split(const int64_t* index, int64_t batch, int64_t length, int64_t keep, int64_t row, void* x,
                           int64_t x_sample, int64_t x_position, void* part, int64_t part_sample, int64_t part_position,
                           void* out, int64_t out_sample, int64_t out_position, int device, cudaStream_t stream) {
  const Rows all{static_cast<char*>(x), x_sample, x_position};
  const Rows few{static_cast<char*>(part), part_sample, part_position};
  const Rows made{static_cast<char*>(out), out_sample, out_position};
  const Kept kept{index, batch, length, keep};
  const uint64_t bits = bits_of_address(all) | bits_of_address(few) | bits_of_address(made);
  return with_words(bits, row, device, [&](auto word, int64_t words) {
    return copy_tiles<decltype(word), true>(all, few, made, kept, words, device, stream);
  });
}

}  // extern "C"
