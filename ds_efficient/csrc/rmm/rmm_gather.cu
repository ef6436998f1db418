// Sketches whose S has one element a row: count sketch, and a choice of rows. Neither generates S; each element of X is
// read at most once.
#include "rmm_cuda.h"

namespace ds_efficient {
namespace rmm {
namespace {

// ---- count sketch ----------------------------------------------------------------------------------------------
// A warp is a block of threads. It owns kColumns columns of one block of rows for kFeatures features, whose sums are in
// shared memory, kPer features a lane. For kScan rows at a time it makes the words and lists, in an order that
// depends on the rows only, those rows that fall into its columns; then it loads kAhead listed rows at a time and adds
// them one after the other. So the sums do not depend on when what runs.

constexpr int kColumns = 32, kPer = 4, kFeatures = 32 * kPer, kAhead = 16;
constexpr int kScan = 1024;  // rows, plus up to 3 before them that share a Philox block
constexpr uint32_t kNegative = 0x80000000u;

struct CountMemory {
  float sum[kColumns][kFeatures];
  uint32_t entry[kScan];  // row of the scan, 10 bits; column << 16; kNegative
};

// Lists the rows start .. start + kScan - 1 (or those there are) of the block that fall into the columns; their number.
__device__ __forceinline__ int list_rows(const Segment& segment, int64_t first_row, int64_t start, int64_t column,
                                         CountMemory& memory) {
  const uint64_t global = static_cast<uint64_t>(segment.base_row + first_row + start);
  const int64_t left = segment.block - start, rows = left < kScan ? left : kScan;
  const uint32_t below = (1u << (threadIdx.x % 32)) - 1u;
  const int skip = static_cast<int>(global % 4);
  int listed = 0;
#pragma unroll 1
  for (int base = 0; base < rows + skip; base += 4 * 32) {
    const keyed::Block words = keyed::words(segment.key, global / 4 + base / 4 + threadIdx.x);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = base + 4 * static_cast<int>(threadIdx.x) + e - skip;
      const int64_t place = count_column(words.word[e], segment.projected) - column;
      const bool mine = row >= 0 && row < rows && place >= 0 && place < kColumns;
      const uint32_t all = __ballot_sync(0xffffffffu, mine);
      if (mine) {
        memory.entry[listed + __popc(all & below)] = static_cast<uint32_t>(row) |
                                                     static_cast<uint32_t>(place) << 16 |
                                                     (count_negative(words.word[e]) ? kNegative : 0u);
      }
      listed += __popc(all);
    }
  }
  __syncwarp();
  return listed;
}

template <typename T>
__global__ void __launch_bounds__(32)
    count_kernel(const Rows x, const Segment segment, uint32_t across, uint32_t chunks, float scale,
                 T* __restrict__ out, bool vector_x, bool vector_out) {
  __shared__ CountMemory memory;
  const uint32_t part = blockIdx.x / across;
  const int64_t block = part / chunks, column = int64_t{part % chunks} * kColumns;
  const int own = static_cast<int>(threadIdx.x) * kPer;
  const int64_t feature = int64_t{blockIdx.x % across} * kFeatures + own, first_row = block * segment.block;
#pragma unroll 4
  for (int c = 0; c < kColumns; ++c) {
#pragma unroll
    for (int e = 0; e < kPer; ++e) memory.sum[c][own + e] = 0.0f;  // this lane's, also below: no barrier
  }
#pragma unroll 1
  for (int64_t start = 0; start < segment.block; start += kScan) {
    const int listed = list_rows(segment, first_row, start, column, memory);
    const T* const source = static_cast<const T*>(x.data) + (first_row + start) * x.stride;
#pragma unroll 1
    for (int base = 0; base < listed; base += kAhead) {
      Pack<T, kPer> values[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i < listed) {
          const int64_t row = memory.entry[base + i] & 0xffffu;
          values[i] = load_columns<T, kPer>(source + row * x.stride, feature, x.features, vector_x);
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (base + i < listed) {
          const uint32_t entry = memory.entry[base + i];
          float* const sum = &memory.sum[(entry & ~kNegative) >> 16][own];
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            const float value = to_float(values[i].value[e]);
            sum[e] += entry & kNegative ? -value : value;
          }
        }
      }
    }
    __syncwarp();  // before the next list
  }
  if (feature >= x.features) return;
  for (int c = 0; c < kColumns && column + c < segment.projected; ++c) {
    Pack<T, kPer> pack;
#pragma unroll
    for (int e = 0; e < kPer; ++e) pack.value[e] = round_to<T>(memory.sum[c][own + e] * scale);
    store_columns(out + (block * segment.projected + column + c) * x.features, feature, x.features, vector_out, pack);
  }
}

template <typename T>
cudaError_t count(const Rows& x, const Segment& segment, float scale, void* out, cudaStream_t stream) {
  constexpr int kBytes = kPer * static_cast<int>(sizeof(T));
  const int64_t across = ceil_div(x.features, kFeatures), chunks = ceil_div(segment.projected, kColumns);
  const int64_t tiles = segment.blocks * across * chunks;
  if (tiles > kMostBlocks) return cudaErrorInvalidConfiguration;
  count_kernel<T><<<static_cast<unsigned>(tiles), 32, 0, stream>>>(
      x, segment, static_cast<uint32_t>(across), static_cast<uint32_t>(chunks), scale, static_cast<T*>(out),
      aligned(x.data, x.stride * int64_t{sizeof(T)}, kBytes), aligned(out, x.features * int64_t{sizeof(T)}, kBytes));
  return cudaGetLastError();
}

// ---- rows ------------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;

// A thread takes 16 bytes of a chosen row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const Rows x, const Segment segment, int64_t vectors, float scale, T* __restrict__ out, bool vector_x,
                bool vector_out) {
  constexpr int kCount = kVector / static_cast<int>(sizeof(T));
  const int64_t total = segment.blocks * segment.projected * vectors;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; p < total; p += stride) {
    const int64_t made = p / vectors, feature = p % vectors * kCount;
    const int64_t row = made / segment.projected * segment.block + __ldg(segment.chosen + made);
    Pack<T, kCount> pack = load_columns<T, kCount>(static_cast<const T*>(x.data) + row * x.stride, feature, x.features,
                                                   vector_x);
#pragma unroll
    for (int e = 0; e < kCount; ++e) pack.value[e] = round_to<T>(to_float(pack.value[e]) * scale);
    store_columns(out + made * x.features, feature, x.features, vector_out, pack);
  }
}

template <typename T>
cudaError_t choose_rows(const Rows& x, const Segment& segment, float scale, void* out, cudaStream_t stream) {
  const int64_t vectors = ceil_div(x.features * int64_t{sizeof(T)}, kVector);
  const int64_t wanted = ceil_div(segment.blocks * segment.projected * vectors, kThreads);
  const int64_t blocks = wanted < kMostBlocks ? wanted : kMostBlocks;
  rows_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      x, segment, vectors, scale, static_cast<T*>(out), aligned(x.data, x.stride * int64_t{sizeof(T)}, kVector),
      aligned(out, x.features * int64_t{sizeof(T)}, kVector));
  return cudaGetLastError();
}

}  // namespace

cudaError_t count_sketch(const Rows& x, const Segment& segment, float scale, void* out, int dtype,
                         cudaStream_t stream) {
  switch (dtype) {
    case kFloat32: return count<float>(x, segment, scale, out, stream);
    case kBfloat16: return count<Bfloat16>(x, segment, scale, out, stream);
    case kFloat16: return count<Float16>(x, segment, scale, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t row_sketch(const Rows& x, const Segment& segment, float scale, void* out, int dtype, cudaStream_t stream) {
  switch (dtype) {
    case kFloat32: return choose_rows<float>(x, segment, scale, out, stream);
    case kBfloat16: return choose_rows<Bfloat16>(x, segment, scale, out, stream);
    case kFloat16: return choose_rows<Float16>(x, segment, scale, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace rmm
}  // namespace ds_efficient
