// Rotary position embedding on CUDA devices; see rotary_common.h. C ABI, no torch headers.
//
// A block takes consecutive tokens: first it makes their cosines and couplings in shared memory, each once for all
// heads, then its threads turn one word of channels and its partner after the other, 16 bytes each as a rule. An index
// outside of the table of angles stops the kernel, as torch's own gathers do.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "rotary_common.h"

#define DS_EFFICIENT_ROTARY_VERSION 1

namespace {

using namespace ds_efficient::rotary;

constexpr int kThreads = 256;
constexpr int64_t kWordsOfBlock = 2 * kThreads;       // that a block takes, where its tokens are small
constexpr int64_t kMostTokens = 16, kMostAngles = 2048;  // of a block; the latter take 32 KB in float64
constexpr int64_t kMostBlocks = 0x7fffffff;

// Element types by their bits, and the type of the arithmetic.
struct Float32 {
  using Stored = uint32_t;
  using Wide = float;
  static __device__ __forceinline__ float load(uint32_t bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ uint32_t store(float value) {
    return static_cast<uint32_t>(ds_efficient::keyed::bits_of(value));
  }
};

struct Bfloat16 {
  using Stored = uint16_t;
  using Wide = float;
  static __device__ __forceinline__ float load(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ uint16_t store(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Wide = float;
  static __device__ __forceinline__ float load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ __forceinline__ uint16_t store(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

struct Float64 {
  using Stored = double;
  using Wide = double;
  static __device__ __forceinline__ double load(double value) { return value; }
  static __device__ __forceinline__ double store(double value) { return value; }
};

// Accurate for every angle, however large.
__device__ __forceinline__ void sine_and_cosine(float angle, float* sine, float* cosine) {
  sincosf(angle, sine, cosine);
}
__device__ __forceinline__ void sine_and_cosine(double angle, double* sine, double* cosine) {
  sincos(angle, sine, cosine);
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  using Type = uint4;
};
template <>
struct BitsOf<8> {
  using Type = uint2;
};
template <>
struct BitsOf<4> {
  using Type = uint32_t;
};
template <>
struct BitsOf<2> {
  using Type = uint16_t;
};

// Some elements as they lie in memory. What is read is not needed again, what is written is: the loads give way in the
// L2 cache.
template <typename T, int kCount>
union Word {
  using Bits = typename BitsOf<kCount * static_cast<int>(sizeof(T))>::Type;
  Bits bits;
  T value[kCount];

  __device__ __forceinline__ void load(const T* from) { bits = __ldcs(reinterpret_cast<const Bits*>(from)); }
  __device__ __forceinline__ void store(T* to) const { __stwb(reinterpret_cast<Bits*>(to), bits); }
};

// kCount numbers of the table, 16 bytes at a time where there are as many.
template <typename Wide, int kCount>
struct Numbers {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(Wide)) < 16 ? static_cast<int>(sizeof(Wide)) : 16;
  static constexpr int kEach = kBytes / static_cast<int>(sizeof(Wide));
  using Bits = typename BitsOf<kBytes>::Type;
  union Part {
    Bits bits;
    Wide value[kEach];
  } part[kCount / kEach];

  __device__ __forceinline__ explicit Numbers(const Wide* from) {
#pragma unroll
    for (int i = 0; i < kCount / kEach; ++i) part[i].bits = reinterpret_cast<const Bits*>(from)[i];
  }
  __device__ __forceinline__ Wide operator[](int i) const { return part[i / kEach].value[i % kEach]; }
};

// The first token of a block, and those after it.
struct Origin {
  int64_t position;
  uint32_t sample, samples;

  __device__ __forceinline__ Origin(const Job& job, int64_t first)
      : position(first / job.samples), samples(static_cast<uint32_t>(job.samples)) {
    sample = static_cast<uint32_t>(first - position * job.samples);
  }
  __device__ __forceinline__ void locate(uint32_t token, int64_t* its_position, int64_t* its_sample) const {
    const uint32_t from = sample + token, further = from / samples;
    *its_position = position + further;
    *its_sample = from - further * samples;
  }
};

// How a block shares its tokens: `count` of them, each heads x parts words, pairs words of which have a partner.
struct Share {
  uint32_t count, parts, pairs;
};

template <typename Wide>
__device__ __forceinline__ void fill_table(const Job& job, const Origin& origin, uint32_t tokens, Wide* cosine,
                                           Wide* coupling) {
  const uint32_t rotated = static_cast<uint32_t>(job.rotated);
  const Wide scale = static_cast<Wide>(job.scale);
  for (uint32_t i = threadIdx.x; i < tokens * rotated; i += kThreads) {
    const uint32_t token = i / rotated, j = i - token * rotated;
    int64_t position, sample;
    origin.locate(token, &position, &sample);
    const int64_t row = job.index ? __ldg(job.index + sample * job.positions + position) : position;
    if (row < 0 || row >= job.length) __trap();
    Wide sine, even;
    sine_and_cosine(static_cast<Wide>(__ldg(job.angles + row * job.angle_position + sample * job.angle_sample + j)),
                    &sine, &even);
    cosine[i] = even * scale;
    coupling[token * rotated + static_cast<uint32_t>(coupling_at(j, rotated, job.transposed))] =
        (j < rotated / 2 ? -sine : sine) * scale;
  }
}

template <typename Element, int kCount>
__global__ void __launch_bounds__(kThreads) turn_kernel(const Job job, const Share share) {
  using Stored = typename Element::Stored;
  using Wide = typename Element::Wide;
  extern __shared__ uint4 memory[];
  const int64_t first = int64_t{blockIdx.x} * share.count, left = job.positions * job.samples - first;
  const uint32_t tokens = left < share.count ? static_cast<uint32_t>(left) : share.count;
  const uint32_t rotated = static_cast<uint32_t>(job.rotated), half = rotated / 2;
  Wide* const cosine = reinterpret_cast<Wide*>(memory);
  Wide* const coupling = cosine + share.count * rotated;
  const Origin origin(job, first);
  fill_table(job, origin, tokens, cosine, coupling);
  __syncthreads();
  const uint32_t heads = static_cast<uint32_t>(job.heads), words = heads * share.parts;
  for (uint32_t i = threadIdx.x; i < tokens * words; i += kThreads) {
    const uint32_t token = i / words, word = i - token * words;
    const uint32_t head = word / share.parts, part = word - head * share.parts;
    int64_t position, sample;
    origin.locate(token, &position, &sample);
    const Stored* const in = static_cast<const Stored*>(job.t) + position * job.t_position + sample * job.t_sample +
                             int64_t{head} * job.t_head;
    Stored* const out = static_cast<Stored*>(job.out) + ((first + token) * heads + head) * job.width;
    Word<Stored, kCount> a, b;
    if (part >= share.pairs) {  // not turned
      const uint32_t at = rotated + (part - share.pairs) * kCount;
      a.load(in + at);
      a.store(out + at);
      continue;
    }
    const uint32_t at = part * kCount, entry = token * rotated + at;
    a.load(in + at);
    b.load(in + at + half);
    const Numbers<Wide, kCount> cosine_a(cosine + entry), coupling_a(coupling + entry);
    const Numbers<Wide, kCount> cosine_b(cosine + entry + half), coupling_b(coupling + entry + half);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Wide x = Element::load(a.value[k]), y = Element::load(b.value[k]);
      a.value[k] = Element::store(x * cosine_a[k] + y * coupling_a[k]);
      b.value[k] = Element::store(y * cosine_b[k] + x * coupling_b[k]);
    }
    a.store(out + at);
    b.store(out + at + half);
  }
}

template <typename Element, int kCount>
cudaError_t launch_turn(const Job& job, cudaStream_t stream) {
  const int64_t half = job.rotated / 2, pairs = half / kCount, parts = pairs + (job.width - job.rotated) / kCount;
  const int64_t words = job.heads * parts, tokens = job.positions * job.samples;
  int64_t count = kWordsOfBlock / words < 1 ? 1 : kWordsOfBlock / words;
  if (count > kMostTokens) count = kMostTokens;
  if (count > kMostAngles / job.rotated) count = kMostAngles / job.rotated;
  const int64_t blocks = count > 0 ? (tokens + count - 1) / count : 0;
  if (count < 1 || count * words > kMostBlocks) return cudaErrorInvalidValue;
  if (blocks > kMostBlocks || job.samples > kMostBlocks) return cudaErrorInvalidConfiguration;
  const size_t bytes = static_cast<size_t>(2 * count * job.rotated) * sizeof(typename Element::Wide);
  const Share share{static_cast<uint32_t>(count), static_cast<uint32_t>(parts), static_cast<uint32_t>(pairs)};
  turn_kernel<Element, kCount><<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(job, share);
  return cudaGetLastError();
}

// Words of 16 bytes where every address of one is a multiple of 16, else single elements.
template <typename Element>
cudaError_t turn(const Job& job, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(typename Element::Stored), kCount = 16 / kSize;
  const int64_t elements = job.t_position | job.t_sample | job.t_head | job.rotated / 2 | job.width;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(job.t) | reinterpret_cast<uintptr_t>(job.out);
  if (addresses % 16 == 0 && elements % kCount == 0) return launch_turn<Element, kCount>(job, stream);
  return launch_turn<Element, 1>(job, stream);
}

}  // namespace

extern "C" {

int ds_efficient_rotary_version() { return DS_EFFICIENT_ROTARY_VERSION; }

const char* ds_efficient_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Returns a cudaError_t. No size is 0; rotated is even, at most width and at most 2048.
int ds_efficient_rotary_turn(const void* t, int64_t t_position, int64_t t_sample, int64_t t_head, void* out,
                             const float* angles, int64_t angle_position, int64_t angle_sample, const int64_t* index,
                             int64_t length, int64_t positions, int64_t samples, int64_t heads, int64_t width,
                             int64_t rotated, double scale, int transposed, int dtype, int device,
                             cudaStream_t stream) {
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  const Job job{t,         t_position, t_sample, t_head, out,   angles,  angle_position, angle_sample,   index, length,
                positions, samples,    heads,    width,  rotated, scale, transposed != 0};
  switch (dtype) {
    case kFloat32: return turn<Float32>(job, stream);
    case kBfloat16: return turn<Bfloat16>(job, stream);
    case kFloat16: return turn<Float16>(job, stream);
    case kFloat64: return turn<Float64>(job, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // extern "C"
