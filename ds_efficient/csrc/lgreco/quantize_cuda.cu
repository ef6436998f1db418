// Bucketed stochastic quantisation on CUDA devices; C ABI, no torch headers. See quantize_common.h.
//
// Quantising, a warp takes a bucket: each lane holds up to kGroups groups of 8 elements in registers, so that memory is
// read once. Dequantising, a thread takes a group.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "quantize_common.h"

namespace {

using namespace ds_efficient::lgreco;
namespace keyed = ds_efficient::keyed;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMostBlocks = 1 << 20, kMostGroups = int64_t{1} << 31;

struct Float32 {
  using Stored = uint32_t;
  static __device__ __forceinline__ float load(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t store(float value) { return static_cast<uint32_t>(keyed::bits_of(value)); }
};

struct Bfloat16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return float_of_bfloat16(bits); }
  static __device__ __forceinline__ uint16_t store(float value) { return bfloat16_of(value); }
};

struct Float16 {
  using Stored = uint16_t;
  static __device__ __forceinline__ float load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ uint16_t store(float value) {
    return value == value ? __half_as_ushort(__float2half_rn(value)) : static_cast<uint16_t>(0x7e00);
  }
};

// Eight elements as they lie in memory.
template <typename Stored>
union Eight {
  uint4 wide[kGroup * sizeof(Stored) / sizeof(uint4)];
  Stored one[kGroup];
};

// `valid` of the eight exist, at least one; `wide`: the address is aligned to 16 bytes.
template <typename Stored>
__device__ __forceinline__ void load_eight(const Stored* from, int valid, bool wide, Eight<Stored>& out) {
  constexpr int kWide = static_cast<int>(kGroup * sizeof(Stored) / sizeof(uint4));
  if (wide && valid == kGroup) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) out.wide[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out.one[i] = from[i < valid ? i : 0];
  }
}

template <typename Stored>
__device__ __forceinline__ void store_eight(Stored* to, int valid, bool wide, const Eight<Stored>& in) {
  constexpr int kWide = static_cast<int>(kGroup * sizeof(Stored) / sizeof(uint4));
  if (wide && valid == kGroup) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) reinterpret_cast<uint4*>(to)[i] = in.wide[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < valid) to[i] = in.one[i];
    }
  }
}

// The codes of a group, `bits` bytes of which `valid` codes are written. kBits is 4, or 0 for any number.
template <int kBits>
__device__ __forceinline__ void store_codes(uint8_t* to, uint64_t group, int bits, int valid) {
  if (kBits == 4 && valid == kGroup) {
    *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(group);
    return;
  }
  if (bits == 8 && valid == kGroup) {
    *reinterpret_cast<uint2*>(to) = uint2{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32)};
    return;
  }
  const int bytes = (valid * bits + 7) / 8;
  for (int i = 0; i < bytes; ++i) to[i] = static_cast<uint8_t>(group >> (8 * i));
}

template <int kBits>
__device__ __forceinline__ uint64_t load_codes(const uint8_t* from, int bits, int valid) {
  if (kBits == 4 && valid == kGroup) return *reinterpret_cast<const uint32_t*>(from);
  if (bits == 8 && valid == kGroup) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    return words.x | static_cast<uint64_t>(words.y) << 32;
  }
  const int bytes = (valid * bits + 7) / 8;
  uint64_t group = 0;
  for (int i = 0; i < bytes; ++i) group |= static_cast<uint64_t>(from[i]) << (8 * i);
  return group;
}

__device__ __forceinline__ float from_lane_below(float value, unsigned delta) {
  return __uint_as_float(__shfl_up_sync(0xffffffffu, static_cast<uint32_t>(keyed::bits_of(value)), delta));
}

// Smallest and largest of a warp, for all its lanes. All threads of the block call it.
__device__ __forceinline__ void reduce_warp(float* lo, float* hi, float (*shared)[2]) {
  const int warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (unsigned delta = 1; delta < 32; delta *= 2) {
    const float low = from_lane_below(*lo, delta), high = from_lane_below(*hi, delta);
    *lo = low < *lo ? low : *lo;
    *hi = high > *hi ? high : *hi;
  }
  if (threadIdx.x % 32 == 31) {
    shared[warp][0] = *lo;
    shared[warp][1] = *hi;
  }
  __syncthreads();
  *lo = shared[warp][0];
  *hi = shared[warp][1];
  __syncthreads();
}

// Codes of eight elements from word `index` of the stream on, a multiple of 8.
template <typename Element, int kBits>
__device__ __forceinline__ uint64_t codes_of(const Eight<typename Element::Stored>& x, int valid, const Scale& scale,
                                             float factor, uint64_t key, uint64_t index, int bits) {
  const uint32_t most = (1u << bits) - 1;
  uint64_t group = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const keyed::Block random = keyed::words(key, index / 4 + static_cast<uint64_t>(half));
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * half + i;
      const uint32_t code = code_of(Element::load(x.one[e]), scale.lo, factor, random.word[i], most);
      if (e < valid) four |= code << (i * bits);
    }
    group |= static_cast<uint64_t>(four) << (4 * half * bits);
  }
  return group;
}

template <typename Element, int kGroups, int kBits>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const typename Element::Stored* __restrict__ x, int64_t n, uint64_t key, int any_bits,
                    int64_t bucket, int64_t buckets, uint8_t* __restrict__ payload, bool wide) {
  __shared__ float shared[kWarps][2];
  const int bits = kBits ? kBits : any_bits;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t first = int64_t{blockIdx.x} * kWarps; first < buckets; first += int64_t{gridDim.x} * kWarps) {
    const int64_t j = first + threadIdx.x / 32, start = j * bucket;
    const int64_t left = n - start < bucket ? n - start : bucket;
    const int count = j < buckets ? static_cast<int>(left) : 0;
    Eight<typename Element::Stored> group[kGroups];
    float lo = __uint_as_float(0x7f800000u), hi = -lo;
    bool bad = false;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int e = (g * 32 + lane) * kGroup;
      if (e >= count) continue;
      load_eight(x + start + e, count - e < kGroup ? count - e : kGroup, wide, group[g]);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {  // those that do not exist repeat the first
        const float value = Element::load(group[g].one[i]);
        lo = value < lo ? value : lo;
        hi = value > hi ? value : hi;
        bad |= !is_finite(value);
      }
    }
    bad = __ballot_sync(0xffffffffu, bad) != 0;
    reduce_warp(&lo, &hi, shared);
    if (count == 0) continue;
    const Scale scale = scale_of(lo, hi, bad, bits);
    const float factor = factor_of(scale);
    if (lane == 0) *reinterpret_cast<Scale*>(payload + 8 * j) = scale;
    uint8_t* const codes = payload + 8 * buckets + start / 8 * bits;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int e = (g * 32 + lane) * kGroup;
      if (e >= count) continue;
      const int valid = count - e < kGroup ? count - e : kGroup;
      uint64_t packed = 0;
      if (factor != 0.0f) {
        packed = codes_of<Element, kBits>(group[g], valid, scale, factor, key, static_cast<uint64_t>(start + e), bits);
      }
      store_codes<kBits>(codes + e / 8 * bits, packed, bits, valid);
    }
  }
}

template <typename Element, bool kAccumulate, int kBits>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const uint8_t* __restrict__ payload, int64_t n, int any_bits, uint32_t groups_of_bucket,
                      int64_t buckets, float weight, typename Element::Stored* __restrict__ out, uint32_t groups,
                      bool wide) {
  const int bits = kBits ? kBits : any_bits;
  const uint32_t mask = (1u << bits) - 1;
  for (int64_t g = int64_t{blockIdx.x} * kThreads + threadIdx.x; g < groups; g += int64_t{gridDim.x} * kThreads) {
    const uint32_t group = static_cast<uint32_t>(g);
    const Scale scale = *reinterpret_cast<const Scale*>(payload + 8 * int64_t{group / groups_of_bucket});
    const int64_t left = n - g * kGroup;
    const int valid = left < kGroup ? static_cast<int>(left) : kGroup;
    const uint64_t packed = load_codes<kBits>(payload + 8 * buckets + g * bits, bits, valid);
    Eight<typename Element::Stored> made;
    if (kAccumulate) load_eight(out + g * kGroup, valid, wide, made);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t four = static_cast<uint32_t>(packed >> (4 * half * bits));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * half + i;
        const float value = value_of(scale, (four >> (i * bits)) & mask);
        const float sum = kAccumulate ? keyed::fma_rn(value, weight, Element::load(made.one[e])) : value * weight;
        made.one[e] = Element::store(sum);
      }
    }
    store_eight(out + g * kGroup, valid, wide, made);
  }
}

unsigned blocks_for(int64_t tasks, int of_block) {
  const int64_t blocks = (tasks + of_block - 1) / of_block;
  return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

bool is_wide(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0; }

bool has_code(int64_t n, int bits, int64_t bucket) {
  return n >= 1 && n <= kMostGroups * kGroup && bits >= 2 && bits <= 8 && bucket >= kGroup && bucket <= kMostBucket &&
         bucket % kGroup == 0;
}

struct Quantize {
  const void* x;
  int64_t n;
  uint64_t key;
  int bits;
  int64_t bucket;
  uint8_t* payload;
  cudaStream_t stream;

  template <typename Element, int kGroups, int kBits>
  cudaError_t launch() const {
    const int64_t buckets = buckets_of(n, bucket);
    const auto* const from = static_cast<const typename Element::Stored*>(x);
    const bool wide = is_wide(x);
    const auto kernel = quantize_kernel<Element, kGroups, kBits>;
    kernel<<<blocks_for(buckets, kWarps), kThreads, 0, stream>>>(from, n, key, bits, bucket, buckets, payload, wide);
    return cudaGetLastError();
  }
  template <typename Element, int kGroups>
  cudaError_t with_groups() const {
    return bits == 4 ? launch<Element, kGroups, 4>() : launch<Element, kGroups, 0>();
  }
  template <typename Element>
  cudaError_t run() const {
    if (bucket <= 256) return with_groups<Element, 1>();
    return bucket <= 512 ? with_groups<Element, 2>() : with_groups<Element, 4>();
  }
};

struct Dequantize {
  const uint8_t* payload;
  int64_t n;
  int bits;
  int64_t bucket;
  float weight;
  bool accumulate;
  void* out;
  cudaStream_t stream;

  template <typename Element, bool kAccumulate, int kBits>
  cudaError_t launch() const {
    const int64_t buckets = buckets_of(n, bucket), groups = buckets_of(n, kGroup);
    auto* const to = static_cast<typename Element::Stored*>(out);
    const bool wide = is_wide(out);
    const auto kernel = dequantize_kernel<Element, kAccumulate, kBits>;
    kernel<<<blocks_for(groups, kThreads), kThreads, 0, stream>>>(
        payload, n, bits, static_cast<uint32_t>(bucket / kGroup), buckets, weight, to, static_cast<uint32_t>(groups),
        wide);
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

template <typename Work>
cudaError_t with_element(const Work& work, int dtype, int device) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  switch (dtype) {
    case kFloat32: return work.template run<Float32>();
    case kBfloat16: return work.template run<Bfloat16>();
    case kFloat16: return work.template run<Float16>();
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_quantize_version() { return DS_EFFICIENT_LGRECO_QUANTIZE_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int ds_efficient_lgreco_quantize(const void* x, int64_t n, uint64_t key, int bits, int64_t bucket, void* payload,
                                 int dtype, int device, cudaStream_t stream) {
  if (!has_code(n, bits, bucket)) return cudaErrorInvalidValue;
  return with_element(Quantize{x, n, key, bits, bucket, static_cast<uint8_t*>(payload), stream}, dtype, device);
}

int ds_efficient_lgreco_dequantize(const void* payload, int64_t n, int bits, int64_t bucket, double weight,
                                   int accumulate, void* out, int dtype, int device, cudaStream_t stream) {
  if (!has_code(n, bits, bucket)) return cudaErrorInvalidValue;
  const Dequantize work{static_cast<const uint8_t*>(payload), n,   bits,  bucket, static_cast<float>(weight),
                        accumulate != 0,                      out, stream};
  return with_element(work, dtype, device);
}

}  // extern "C"
