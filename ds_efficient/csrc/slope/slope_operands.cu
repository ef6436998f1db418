// N:M sparse matrices on CUDA devices: operands of the 2:4 sparse products. C ABI, no torch headers; see
// slope_common.h for the formats.
#include <cuda_pipeline.h>

#include "slope_cuda.h"

namespace {

using namespace ds_efficient::slope;

// Forward operand where it is no plain copy: a lane takes half a mask word, 8 slots.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_operand_kernel(const T* __restrict__ values, const uint32_t* __restrict__ forward, T* __restrict__ out,
                           int64_t first_row, Matrix shape, uint32_t across) {
  constexpr int kHalfWord = kWord / 2;
  const Place place = place_of_warp(across);
  const int64_t column = (place.stretch * 32 + threadIdx.x % 32) * kHalfWord;
  if (place.row >= shape.rows || column >= shape.columns) return;
  const int64_t row = first_row + place.row;
  const uint32_t word = __ldg(forward + row * shape.words + column / kWord);
  const int shift = static_cast<int>(column % kWord);
  const uint32_t bits = (word >> shift) & existing_bits(column, shape.columns, kHalfWord);
  const T* next = values + row * shape.kept + column / kWord * shape.per_word + place_in_word(word, shift);
  T* const target = out + place.row * (shape.columns / kGroup * kSlots) + column / kGroup * kSlots;
#pragma unroll
  for (int g = 0; g < kHalfWord / kGroup; ++g) {
    if (column + g * kGroup >= shape.columns) break;
    const uint32_t kept = (bits >> (g * kGroup)) & 15u;
    SlotPair<T> pair{0, 0};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if ((kept >> j) & 1u) push(pair, __ldg(next++));
    }
    finish(pair, kept);
    target[kSlots * g] = pair.first;
    target[kSlots * g + 1] = pair.second;
  }
}

template <typename T>
cudaError_t forward_operand(const void* values, const uint32_t* forward, void* out, int64_t columns,
                            int64_t first_row, int64_t rows, int n, int m, cudaStream_t stream) {
  const Matrix shape = matrix_of(rows, columns, n, m);
  const T* const source = static_cast<const T*>(values);
  if (compact_is_operand(n, m)) {
    return cudaMemcpyAsync(out, source + first_row * shape.kept, static_cast<size_t>(rows * shape.kept) * sizeof(T),
                           cudaMemcpyDeviceToDevice, stream);
  }
  const int64_t across = ceil_div(columns, 32 * (kWord / 2)), blocks = blocks_of(rows, across);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  forward_operand_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      source, forward, static_cast<T*>(out), first_row, shape, static_cast<uint32_t>(across));
  return cudaGetLastError();
}

// Backward operand: a block takes kTileOutputs rows and kTileInputs columns of the matrix. Values and masks of the
// tile go to shared memory, 128 contiguous bytes a row in the common case; each lane of a warp takes one column of a
// mask word, so that all lanes share the mask words of a group and read at most a word's contiguous values; the
// finished slots pass through the same shared memory to be stored along the outputs.
struct Alignment {
  bool values, masks, out;
};

template <typename T>
struct alignas(kVector) TileMemory {
  // Values of a row: at most half a word's; then the slots. The padding is read, and what is read there not used.
  T data[kTileOutputs * kTileWords * (kWord / 2) + kWord];
  uint32_t forward[kTileWords][kTileOutputs], backward[kTileWords][kTileOutputs];
};

// log2 of the values of a row of a whole tile: at compile time where kShift is not 0.
template <int kShift>
__device__ __forceinline__ int tile_shift(int shift) {
  return kShift != 0 ? kShift : shift;
}
constexpr int kHalfShift = 6;  // where half of the matrix is kept
static_assert(1 << kHalfShift == kTileInputs / 2, "values of a row of a tile at 1:2 and 2:4");

template <typename T>
__device__ __forceinline__ void load_values(const T* __restrict__ source, int outputs, int count, int64_t pitch,
                                            int shift, bool vector, TileMemory<T>& memory) {
  constexpr int kPer = kPerVector<T>;
  if (vector) {
    const int chunks = shift - (sizeof(T) == 2 ? 3 : 2);  // log2 of the chunks of a row
#pragma unroll 4
    for (int p = threadIdx.x; p < kTileOutputs << chunks; p += kTileThreads) {
      const int row = p >> chunks, at = (p & ((1 << chunks) - 1)) * kPer;
      if (row < outputs && at < count) {
        __pipeline_memcpy_async(memory.data + (row << shift) + at, source + row * pitch + at, kVector);
      }
    }
  } else {
    for (int p = threadIdx.x; p < kTileOutputs << shift; p += kTileThreads) {
      const int row = p >> shift, at = p & ((1 << shift) - 1);
      if (row < outputs && at < count) memory.data[p] = __ldg(source + row * pitch + at);
    }
  }
  __pipeline_commit();
}

// A thread loads the words of one row of one mask; what is not there is 0.
template <typename T>
__device__ __forceinline__ void load_masks(const uint32_t* __restrict__ forward, const uint32_t* __restrict__ backward,
                                           int outputs, int64_t words, int64_t left, bool vector,
                                           TileMemory<T>& memory) {
  static_assert(2 * kTileOutputs == kTileThreads && kTileWords == 4, "one uint4 a thread");
  const int row = threadIdx.x % kTileOutputs;
  const bool second = threadIdx.x >= kTileOutputs;
  const uint32_t* const mask = (second ? backward : forward) + row * words;
  uint4 bits{0, 0, 0, 0};
  if (row < outputs) {
    if (vector && left >= kTileWords) {
      bits = __ldg(reinterpret_cast<const uint4*>(mask));
    } else {
      bits.x = __ldg(mask);
      if (left > 1) bits.y = __ldg(mask + 1);
      if (left > 2) bits.z = __ldg(mask + 2);
      if (left > 3) bits.w = __ldg(mask + 3);
    }
  }
  uint32_t(&target)[kTileWords][kTileOutputs] = second ? memory.backward : memory.forward;
  target[0][row] = bits.x, target[1][row] = bits.y, target[2][row] = bits.z, target[3][row] = bits.w;
}

// The slots of this lane's column in the groups of 4 outputs that this warp has.
template <typename T>
__device__ __forceinline__ void gather_slots(const TileMemory<T>& memory, int shift, int per_word,
                                             Pack<T, kSlots> (&slots)[kTilePasses]) {
  const int word = threadIdx.x / 32 % kTileWords, first_group = threadIdx.x / 32 / kTileWords * kTilePasses;
  const uint32_t own = 1u << (threadIdx.x % 32), below = own - 1u;
  const T* const values = memory.data + (first_group * kGroup << shift) + word * per_word;
#pragma unroll
  for (int p = 0; p < kTilePasses; ++p) {
    const uint4 forward = *reinterpret_cast<const uint4*>(&memory.forward[word][(first_group + p) * kGroup]);
    const uint4 backward = *reinterpret_cast<const uint4*>(&memory.backward[word][(first_group + p) * kGroup]);
    const uint32_t all[kGroup] = {forward.x, forward.y, forward.z, forward.w};
    const uint32_t used[kGroup] = {backward.x, backward.y, backward.z, backward.w};
    bool mine[kGroup];
    SlotPair<T> pair{0, 0};
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {  // no branches: a pruned element reads a value too and drops it
      const T value = values[((p * kGroup + j) << shift) + count_bits(all[j] & below)];
      mine[j] = (all[j] & used[j] & own) != 0u;
      pair.first = mine[j] ? pair.second : pair.first;
      pair.second = mine[j] ? value : pair.second;
    }
    finish(pair, mine[0] && !(mine[1] || mine[2] || mine[3]) ? 1u : 0u);
    slots[p].value[0] = pair.first;
    slots[p].value[1] = pair.second;
  }
}

template <typename T>
__device__ __forceinline__ void stage_slots(const Pack<T, kSlots> (&slots)[kTilePasses], TileMemory<T>& memory) {
  constexpr int kPer = kPerVector<T>, kPairs = kPer / kSlots;  // pairs of a chunk
  const int lane = threadIdx.x % 32, word = threadIdx.x / 32 % kTileWords;
  const int first_group = threadIdx.x / 32 / kTileWords * kTilePasses;
#pragma unroll
  for (int p = 0; p < kTilePasses; p += kPairs) {
    Pack<T, kPer> chunk;
#pragma unroll
    for (int e = 0; e < kPer; ++e) chunk.value[e] = slots[p + e / kSlots].value[e % kSlots];
    const int place = tile_chunk<sizeof(T)>(word * kWord + lane, (first_group + p) / kPairs);
    store_pack(memory.data + place * kPer, chunk);
  }
}

// `target` is where the first slot of the first input feature of the tile goes, `before` how many of its features lie
// before the rows to write, `rows` how many do not lie behind them, `left` the slots from the first one on.
template <typename T>
__device__ __forceinline__ void store_tile(const TileMemory<T>& memory, T* __restrict__ target, int64_t before,
                                           int64_t rows, int64_t pitch, int64_t left, bool vector) {
  constexpr int kPer = kPerVector<T>, kChunks = kTileRow / kPer, kStep = kTileThreads / kChunks;
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  if (chunk * kPer >= left) return;
  target += first * pitch + chunk * kPer;
#pragma unroll
  for (int row = 0; row < kTileInputs; row += kStep) {
    if (row + first >= before && row + first < rows) {
      const auto made = load_pack<Pack<T, kPer>>(memory.data + tile_chunk<sizeof(T)>(row + first, chunk) * kPer);
      if (vector) {
        store_pack_global(target + row * pitch, made);
      } else {
#pragma unroll
        for (int e = 0; e < kPer; ++e) {
          if (chunk * kPer + e < left) target[row * pitch + e] = made.value[e];
        }
      }
    }
  }
}

template <typename T, int kShift>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 && kShift != 0 ? 3 : 2)
    backward_operand_kernel(const T* __restrict__ values, const uint32_t* __restrict__ forward,
                            const uint32_t* __restrict__ backward, T* __restrict__ out, int64_t first_row,
                            int64_t rows, Matrix shape, int runtime_shift, TileGrid grid, Alignment align) {
  __shared__ TileMemory<T> memory;
  const int shift = tile_shift<kShift>(runtime_shift), per_word = (1 << shift) / kTileWords;
  const int64_t output = int64_t{blockIdx.x / grid.across} * kTileOutputs;
  const int64_t word = grid.first_word + int64_t{blockIdx.x % grid.across} * kTileWords;
  const int outputs = static_cast<int>(shape.rows - output < kTileOutputs ? shape.rows - output : kTileOutputs);
  const int64_t first = word * per_word, left = shape.kept - first;
  load_values(values + output * shape.kept + first, outputs, left < 1 << shift ? static_cast<int>(left) : 1 << shift,
              shape.kept, shift, align.values, memory);
  const int64_t mask_start = output * shape.words + word;
  load_masks(forward + mask_start, backward + mask_start, outputs, shape.words, shape.words - word, align.masks,
             memory);
  __pipeline_wait_prior(0);
  __syncthreads();
  Pack<T, kSlots> slots[kTilePasses];
  gather_slots(memory, shift, per_word, slots);
  __syncthreads();
  stage_slots(slots, memory);
  __syncthreads();
  const int64_t pitch = shape.rows / kGroup * kSlots, column = output / kGroup * kSlots;
  const int64_t before = first_row - word * kWord;  // may be negative
  store_tile(memory, out - before * pitch + column, before, before + rows, pitch, pitch - column, align.out);
}

template <typename T>
cudaError_t backward_operand(const void* values, const uint32_t* forward, const uint32_t* backward, void* out,
                             int64_t outputs, int64_t inputs, int64_t first_row, int64_t rows, int n, int m,
                             cudaStream_t stream) {
  const Matrix shape = matrix_of(outputs, inputs, n, m);
  int shift = 0;  // values of a row of a tile: a power of two, since a 2:4 operand has 1 or 2 of M
  while (1 << shift < kTileWords * shape.per_word) ++shift;
  if (1 << shift != kTileWords * shape.per_word || shape.per_word > kWord / 2) return cudaErrorInvalidValue;
  const TileGrid grid = tile_grid(first_row, rows);
  const int64_t tiles = int64_t{grid.across} * ceil_div(outputs, kTileOutputs);
  if (tiles > kMostBlocks) return cudaErrorInvalidConfiguration;
  const int64_t row_bytes = outputs / kGroup * kSlots * int64_t{sizeof(T)};
  const Alignment align{
      (1 << shift) >= kPerVector<T> && aligned(values, shape.kept * int64_t{sizeof(T)}, kVector),
      aligned(forward, shape.words * 4, kVector) && aligned(backward, shape.words * 4, kVector),
      aligned(out, row_bytes, kVector)};
  const auto kernel = shift == kHalfShift ? backward_operand_kernel<T, kHalfShift> : backward_operand_kernel<T, 0>;
  kernel<<<static_cast<unsigned>(tiles), kTileThreads, 0, stream>>>(
      static_cast<const T*>(values), forward, backward, static_cast<T*>(out), first_row, rows, shape, shift, grid,
      align);
  return cudaGetLastError();
}

// Ones at the slots of every group: of the matrix, or of its transpose.
template <typename T, bool kTransposed>
__global__ void __launch_bounds__(kThreads)
    pattern_kernel(const uint32_t* __restrict__ mask, T* __restrict__ out, int64_t rows, int64_t columns, T one) {
  const int64_t words = words_of(columns);
  const int64_t lines = kTransposed ? columns : rows, groups = (kTransposed ? rows : columns) / kGroup;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < lines * groups; p += stride) {
    const int64_t line = p / groups, start = p % groups * kGroup;
    uint32_t kept = 0;
    if (kTransposed) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        kept |= ((__ldg(mask + (start + j) * words + line / kWord) >> (line % kWord)) & 1u) << j;
      }
    } else {
      kept = (__ldg(mask + line * words + start / kWord) >> (start % kWord)) & 15u;
    }
    const uint32_t slots = complete_slots(kept);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) out[line * groups * kGroup + start + j] = (slots >> j) & 1u ? one : T{0};
  }
}

template <typename T>
cudaError_t pattern(const uint32_t* mask, void* out, int64_t rows, int64_t columns, bool transposed, uint32_t one,
                    cudaStream_t stream) {
  const auto kernel = transposed ? pattern_kernel<T, true> : pattern_kernel<T, false>;
  const int64_t wanted = ceil_div(rows * columns / kGroup, kThreads);
  const int64_t blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      mask, static_cast<T*>(out), rows, columns, static_cast<T>(one));
  return cudaGetLastError();
}

}  // namespace

extern "C" {

// Each returns a cudaError_t; `size` is the number of bytes of an element, 2 or 4. Masks as in slope_cuda.cu.

// Rows first_row .. first_row + rows - 1 of the operand of the matrix, (rows, columns / 2).
int ds_efficient_slope_forward_operand(const void* values, const uint32_t* forward, void* out, int64_t columns,
                                       int64_t first_row, int64_t rows, int n, int m, int size, int device,
                                       cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || columns == 0) return error;
  switch (size) {
    case 2: return forward_operand<uint16_t>(values, forward, out, columns, first_row, rows, n, m, stream);
    case 4: return forward_operand<uint32_t>(values, forward, out, columns, first_row, rows, n, m, stream);
    default: return cudaErrorInvalidValue;
  }
}

// Rows first_row .. first_row + rows - 1 of the operand of the transpose of the (outputs, inputs) matrix that the
// backward mask leaves, (rows, outputs / 2); n is 1 or 2.
int ds_efficient_slope_backward_operand(const void* values, const uint32_t* forward, const uint32_t* backward,
                                        void* out, int64_t outputs, int64_t inputs, int64_t first_row, int64_t rows,
                                        int n, int m, int size, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || outputs == 0) return error;
  switch (size) {
    case 2:
      return backward_operand<uint16_t>(values, forward, backward, out, outputs, inputs, first_row, rows, n, m, stream);
    case 4:
      return backward_operand<uint32_t>(values, forward, backward, out, outputs, inputs, first_row, rows, n, m, stream);
    default: return cudaErrorInvalidValue;
  }
}

// `one` is the bit pattern of 1; out is (rows, columns), or (columns, rows) where transposed.
int ds_efficient_slope_pattern(const uint32_t* mask, void* out, int64_t rows, int64_t columns, int transposed,
                               uint32_t one, int size, int device, cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess || rows == 0 || columns == 0) return error;
  switch (size) {
    case 2: return pattern<uint16_t>(mask, out, rows, columns, transposed != 0, one, stream);
    case 4: return pattern<uint32_t>(mask, out, rows, columns, transposed != 0, one, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
