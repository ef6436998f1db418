// Bucketed stochastic quantisation on CUDA devices; C ABI, no torch headers. See quantize_common.h.
//
// Quantising, a warp takes a bucket and holds it in registers, so that memory is read once; dequantising, a warp takes
// kPieces pieces of 128 elements. In both a lane has four adjacent elements of a piece: loads and stores of a warp fill
// whole lines. One Philox block serves eight elements. Of 32-bit elements at 4 bits 4.5 bytes are moved an element,
// against some 30 instructions to quantise one, so that memory is what limits both kernels.
#include "elements_cuda.h"
#include "quantize_common.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kPiece = 128;  // elements of a warp, four a lane
constexpr int kPieces = 4;   // of a warp that dequantises
constexpr int64_t kMostBlocks = 1 << 20, kMostElements = int64_t{1} << 34;

// ---- codes ---------------------------------------------------------------------------------------------------------

// Writes the codes of four elements of each lane, `left` elements from the lane's first to the end of the bucket, to the
// place of the lane where 4 codes are whole bytes, else to that of its pair of lanes. All lanes of the warp call it.
template <int kBits>
__device__ __forceinline__ void store_codes(uint8_t* to, uint32_t four, int any_bits, int left) {
  if (kBits == 4) {
    if (left > 2) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(four);
    } else if (left > 0) {
      *to = static_cast<uint8_t>(four);
    }
    return;
  }
  const uint32_t other = __shfl_xor_sync(0xffffffffu, four, 1);
  if (threadIdx.x % 2 || left <= 0) return;
  const uint64_t group = four | static_cast<uint64_t>(other) << (4 * any_bits);
  if (any_bits == 8 && left >= kGroup) {
    *reinterpret_cast<uint2*>(to) = uint2{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32)};
    return;
  }
  const int bytes = ((left < kGroup ? left : kGroup) * any_bits + 7) / 8;
  for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(group >> (8 * i));
}

// The 32 bits from bit 32 * word on; 0 beyond the last of `bytes`.
__device__ __forceinline__ uint32_t load_word(const uint8_t* codes, int64_t word, int64_t bytes) {
  if (4 * word + 4 <= bytes) return *reinterpret_cast<const uint32_t*>(codes + 4 * word);
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    if (4 * word + i < bytes) made |= static_cast<uint32_t>(codes[4 * word + i]) << (8 * i);
  }
  return made;
}

// Codes of the elements element .. element + 3, a multiple of 4; those at n or beyond are not used.
template <int kBits>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* codes, int64_t element, int any_bits, int64_t bytes) {
  if (kBits == 4) {
    if (element / 2 + 2 <= bytes) return *reinterpret_cast<const uint16_t*>(codes + element / 2);
    return codes[element / 2];
  }
  const int64_t bit = element * any_bits;
  const int shift = static_cast<int>(bit % 32);
  uint64_t both = load_word(codes, bit / 32, bytes);
  if (shift + 4 * any_bits > 32) both |= static_cast<uint64_t>(load_word(codes, bit / 32 + 1, bytes)) << 32;
  return static_cast<uint32_t>(both >> shift);
}

// ---- quantise ------------------------------------------------------------------------------------------------------

struct Feedback {
  const float* error;  // null: there is none yet
  float* next;
  float unscale;
  bool wide;
};

// A bucket of a warp: lane l has elements piece * 128 + 4 * l + 0..3 that exist. Nothing is computed before the last
// load is on its way.
template <typename Element, int kInRow, bool kFeedback>
__device__ __forceinline__ void load_bucket(const typename Element::Stored* x, int count, int lane, bool wide,
                                            const Feedback& feedback, int64_t start, float (&value)[kInRow][4]) {
  Four<typename Element::Stored> raw[kInRow];
  Four<uint32_t> error[kInRow];
  const uint32_t* const errors = reinterpret_cast<const uint32_t*>(feedback.error);
  const bool whole = count == kInRow * kPiece && wide && (!kFeedback || feedback.wide);
#pragma unroll
  for (int c = 0; c < kInRow; ++c) {
    const int e = c * kPiece + 4 * lane, valid = count - e < 4 ? count - e : 4;
    if (whole) {
      raw[c] = load_wide(x + start + e);
      if (kFeedback && errors) error[c] = load_wide(errors + start + e);
    } else if (valid > 0) {
      raw[c] = load_four(x + start + e, valid, wide);
      if (kFeedback && errors) error[c] = load_four(errors + start + e, valid, feedback.wide);
    }
  }
#pragma unroll
  for (int c = 0; c < kInRow; ++c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (c * kPiece + 4 * lane >= count) {
        value[c][i] = 0.0f;
        continue;
      }
      value[c][i] = Element::load(raw[c].one[i]);
      if (kFeedback) {
        const float before = errors ? __uint_as_float(error[c].one[i]) : kNoError;
        value[c][i] = corrected(value[c][i], feedback.unscale, before);
      }
    }
  }
}

// Scale of the bucket, on all lanes.
template <int kInRow>
__device__ __forceinline__ Scale scale_of_warp(const float (&value)[kInRow][4], int count, int lane, int bits) {
  float lo = __uint_as_float(0x7f800000u), hi = -lo;
  bool bad = false;  // NaN; infinity shows in the range
#pragma unroll
  for (int c = 0; c < kInRow; ++c) {
    if (c * kPiece + 4 * lane >= count) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // those that do not exist repeat the first
      lo = smaller_of(lo, value[c][i]);
      hi = larger_of(hi, value[c][i]);
      bad |= value[c][i] != value[c][i];
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    lo = smaller_of(lo, from_lane_across(lo, mask));
    hi = larger_of(hi, from_lane_across(hi, mask));
  }
  return scale_of(lo, hi, __ballot_sync(0xffffffffu, bad) != 0, bits);
}

// The codes of a bucket, and what they lose.
template <int kInRow, int kBits, bool kFeedback>
__device__ __forceinline__ void write_codes(const float (&value)[kInRow][4], int count, int lane, const Scale& scale,
                                            int bits, uint64_t key, uint64_t block, uint8_t* codes, float* next,
                                            bool wide) {
  const uint32_t most = (1u << bits) - 1;
  const float factor = factor_of(scale);
  const uint32_t keep = factor == 0.0f ? 0 : ~0u;  // a mask, since a branch would make the compiler draw in each of four
  uint8_t* const mine = codes + (kBits == 4 ? 2 * lane : lane / 2 * bits);
#pragma unroll
  for (int pair = 0; pair < kInRow / 2; ++pair) {
    if (pair * kOfBlocks >= count) break;  // the same for all lanes
    const keyed::Block random = keyed::words(key, block + static_cast<uint64_t>(32 * pair + lane));
#pragma unroll
    for (int c = 2 * pair; c < 2 * pair + 2; ++c) {
      const int left = count - c * kPiece - 4 * lane, valid = left < 4 ? left : 4;
      uint32_t four = 0;
      Four<uint32_t> error;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = random.word[2 * (c % 2) + i / 2], half = i % 2 ? word >> 16 : word & 0xffffu;
        const uint32_t code = code_of(value[c][i], scale.lo, factor, half, most) & keep;
        four += code << (i * bits);
        if (kFeedback) error.one[i] = static_cast<uint32_t>(keyed::bits_of(value[c][i] - value_of(scale, code)));
      }
      if (valid < 4) four &= valid > 0 ? (1u << (valid * bits)) - 1 : 0u;
      store_codes<kBits>(mine + c * (kPiece / 8) * bits, four, bits, left);
      if (kFeedback && valid > 0) {
        store_four(reinterpret_cast<uint32_t*>(next) + c * kPiece + 4 * lane, valid, wide, error);
      }
    }
  }
}

// Blocks of a multiprocessor: as many as leave the registers that a bucket needs.
constexpr int resident(int in_row, int bits, bool feedback) {
  return in_row > 4 ? (feedback ? 1 : 2) : feedback ? 2 : bits == 4 ? 4 : 3;
}

template <typename Element, int kInRow, int kBits, bool kFeedback>
__global__ void __launch_bounds__(kThreads, resident(kInRow, kBits, kFeedback))
    quantize_kernel(const typename Element::Stored* x, Feedback feedback, int64_t n, uint64_t key, int any_bits,
                    int64_t bucket, int64_t buckets, uint8_t* __restrict__ payload, bool wide) {
  const int bits = kBits ? kBits : any_bits;
  const int lane = static_cast<int>(threadIdx.x % 32);
  uint8_t* const codes = payload + 8 * buckets;
  for (int64_t j = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; j < buckets; j += int64_t{gridDim.x} * kWarps) {
    const int64_t start = j * bucket, left = n - start < bucket ? n - start : bucket;
    const int count = static_cast<int>(left);
    float value[kInRow][4];
    load_bucket<Element, kInRow, kFeedback>(x, count, lane, wide, feedback, start, value);
    const Scale scale = scale_of_warp(value, count, lane, bits);
    if (lane == 0) *reinterpret_cast<uint2*>(payload + 8 * j) =
        uint2{static_cast<uint32_t>(keyed::bits_of(scale.lo)), static_cast<uint32_t>(keyed::bits_of(scale.unit))};
    write_codes<kInRow, kBits, kFeedback>(value, count, lane, scale, bits, key, first_block(j, bucket),
                                          codes + start / 8 * bits, feedback.next + start, feedback.wide);
  }
}

// ---- dequantise ----------------------------------------------------------------------------------------------------

struct Payloads {
  const uint8_t* first;
  int64_t ranks, stride, buckets, bytes;  // bytes: of the codes of one
  uint32_t fours;                         // groups of four elements in a bucket
  int shift;                              // log2 of `fours`, or -1

  __device__ __forceinline__ uint32_t bucket_of(uint32_t four) const { return shift >= 0 ? four >> shift : four / fours; }
};

// The sums of kPieces pieces from `base` on; kWhole: all exist and `out` suits wide access.
template <typename Element, bool kAccumulate, int kBits, bool kWhole>
__device__ __forceinline__ void add_pieces(const Payloads& in, int64_t base, int64_t n, int bits, float weight,
                                           typename Element::Stored* out, bool wide) {
  const uint32_t mask = (1u << bits) - 1;
  float sum[kPieces][4];
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    const int64_t e = base + c * kPiece, left = n - e;
    Four<typename Element::Stored> before;
    if (kAccumulate && (kWhole || left > 0)) {
      before = kWhole ? load_wide(out + e) : load_four(out + e, left < 4 ? static_cast<int>(left) : 4, wide);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[c][i] = kAccumulate && (kWhole || left > 0) ? Element::load(before.one[i]) : kNoError;
    }
  }
  for (int64_t rank = 0; rank < in.ranks; ++rank) {
    const uint8_t* const payload = in.first + rank * in.stride;
    uint32_t four[kPieces];
    uint2 scales[kPieces];
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const int64_t e = base + c * kPiece;
      four[c] = 0;
      scales[c] = uint2{0, 0};
      if (kWhole || e < n) {
        four[c] = load_codes<kBits>(payload + 8 * in.buckets, e, bits, in.bytes);
        scales[c] = reinterpret_cast<const uint2*>(payload)[in.bucket_of(static_cast<uint32_t>(e / 4))];
      }
    }
#pragma unroll
    for (int c = 0; c < kPieces; ++c) {
      const Scale scale{__uint_as_float(scales[c].x), __uint_as_float(scales[c].y)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[c][i] = keyed::fma_rn(value_of(scale, (four[c] >> (i * bits)) & mask), weight, sum[c][i]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kPieces; ++c) {
    const int64_t e = base + c * kPiece, left = n - e;
    Four<typename Element::Stored> made;
#pragma unroll
    for (int i = 0; i < 4; ++i) made.one[i] = Element::store(sum[c][i]);
    if (kWhole) {
      store_wide(out + e, made);
    } else if (left > 0) {
      store_four(out + e, left < 4 ? static_cast<int>(left) : 4, wide, made);
    }
  }
}

template <typename Element, bool kAccumulate, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const Payloads in, int64_t n, int any_bits, float weight, typename Element::Stored* out,
                      int64_t tasks, bool wide) {
  const int bits = kBits ? kBits : any_bits;
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t task = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; task < tasks; task += stride) {
    const int64_t first = task * (kPieces * kPiece), base = first + 4 * (threadIdx.x % 32);
    if (wide && first + kPieces * kPiece <= n) {
      add_pieces<Element, kAccumulate, kBits, true>(in, base, n, bits, weight, out, wide);
    } else {
      add_pieces<Element, kAccumulate, kBits, false>(in, base, n, bits, weight, out, wide);
    }
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

unsigned blocks_for(int64_t tasks, int of_block) {
  const int64_t blocks = (tasks + of_block - 1) / of_block;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

bool has_code(int64_t n, int bits, int64_t bucket) {
  return n >= 1 && n <= kMostElements && bits >= 2 && bits <= 8 && bucket >= kGroup && bucket <= kMostBucket &&
         bucket % kGroup == 0;
}

struct Quantize {
  const void* x;
  Feedback feedback;
  int64_t n;
  uint64_t key;
  int bits;
  int64_t bucket;
  uint8_t* payload;
  cudaStream_t stream;

  template <typename Element, int kInRow, int kBits, bool kFeedback>
  cudaError_t launch() const {
    const int64_t buckets = buckets_of(n, bucket);
    const auto* const from = static_cast<const typename Element::Stored*>(x);
    const bool wide = is_wide(from);
    const auto kernel = quantize_kernel<Element, kInRow, kBits, kFeedback>;
    kernel<<<blocks_for(buckets, kWarps), kThreads, 0, stream>>>(from, feedback, n, key, bits, bucket, buckets, payload,
                                                                 wide);
    return cudaGetLastError();
  }
  template <typename Element, int kInRow>
  cudaError_t with_pieces() const {
    if (feedback.next) return bits == 4 ? launch<Element, kInRow, 4, true>() : launch<Element, kInRow, 0, true>();
    return bits == 4 ? launch<Element, kInRow, 4, false>() : launch<Element, kInRow, 0, false>();
  }
  template <typename Element>
  cudaError_t run() const {
    return bucket <= 4 * kPiece ? with_pieces<Element, 4>() : with_pieces<Element, 8>();
  }
};

struct Dequantize {
  Payloads in;
  int64_t n;
  int bits;
  float weight;
  bool accumulate;
  void* out;
  cudaStream_t stream;

  template <typename Element, bool kAccumulate, int kBits>
  cudaError_t launch() const {
    const int64_t tasks = buckets_of(n, kPieces * kPiece);
    auto* const to = static_cast<typename Element::Stored*>(out);
    const bool wide = is_wide(to);
    const auto kernel = dequantize_kernel<Element, kAccumulate, kBits>;
    kernel<<<blocks_for(tasks, kWarps), kThreads, 0, stream>>>(in, n, bits, weight, to, tasks, wide);
    return cudaGetLastError();
  }
  template <typename Element, bool kAccumulate>
  cudaError_t with_bits() const {
    return bits == 4 ? launch<Element, kAccumulate, 4>() : launch<Element, kAccumulate, 0>();
  }
  template <typename Element>
  cudaError_t run() const {
    return accumulate ? with_bits<Element, true>() : with_bits<Element, false>();
  }
};

}  // namespace

extern "C" {

int ds_efficient_lgreco_quantize_version() { return DS_EFFICIENT_LGRECO_QUANTIZE_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ds_efficient_lgreco_quantize(const void* x, const float* error, float* new_error, double unscale, int64_t n,
                                 uint64_t key, int bits, int64_t bucket, void* payload, int dtype, int device,
                                 cudaStream_t stream) {
  if (!has_code(n, bits, bucket)) return cudaErrorInvalidValue;
  const bool wide = is_wide(reinterpret_cast<const uint32_t*>(error)) &&
                    is_wide(reinterpret_cast<const uint32_t*>(new_error));
  const Feedback feedback{error, new_error, static_cast<float>(unscale), wide};
  const Quantize work{x, feedback, n, key, bits, bucket, static_cast<uint8_t*>(payload), stream};
  return with_element(work, dtype, device);
}

int ds_efficient_lgreco_dequantize(const void* payload, int64_t ranks, int64_t stride, int64_t n, int bits,
                                   int64_t bucket, double weight, int accumulate, void* out, int dtype, int device,
                                   cudaStream_t stream) {
  if (!has_code(n, bits, bucket) || ranks < 1 || stride % 8) return cudaErrorInvalidValue;
  const int64_t fours = bucket / 4;
  int shift = 0;
  while ((int64_t{1} << shift) < fours) ++shift;
  const Payloads in{static_cast<const uint8_t*>(payload), ranks, stride, buckets_of(n, bucket), (n * bits + 7) / 8,
                    static_cast<uint32_t>(fours), (int64_t{1} << shift) == fours ? shift : -1};
  const Dequantize work{in, n, bits, static_cast<float>(weight), accumulate != 0, out, stream};
  return with_element(work, dtype, device);
}

}  // extern "C"
