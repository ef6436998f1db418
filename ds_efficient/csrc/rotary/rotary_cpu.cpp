// Rotary position embedding on the CPU; see rotary_common.h. C ABI, no torch headers.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "number_types_cpu.h"
#include "parallel.h"
#include "rotary_common.h"

#define DS_EFFICIENT_ROTARY_VERSION 1

namespace {

using namespace ds_efficient;
using namespace ds_efficient::rotary;

constexpr int64_t kElementsPerThread = 1 << 15;  // fewer are not worth a thread
enum Status { kDone = 0, kUnknown = 1, kNoMemory = 2 };

// Cosines and couplings of one token.
template <typename Wide>
void fill(const Job& job, const float* angles, Wide* cosine, Wide* coupling) {
  const Wide scale = static_cast<Wide>(job.scale);
  for (int64_t j = 0; j < job.rotated; ++j) {
    const Wide angle = angles[j], sine = std::sin(angle) * scale;
    cosine[j] = std::cos(angle) * scale;
    coupling[coupling_at(j, job.rotated, job.transposed)] = j < job.rotated / 2 ? -sine : sine;
  }
}

template <typename Element>
void turn_head(const Job& job, const typename Element::Stored* in, const typename Element::Wide* cosine,
               const typename Element::Wide* coupling, typename Element::Stored* out) {
  const int64_t half = job.rotated / 2;
  for (int64_t j = 0; j < half; ++j) {
    const auto first = Element::load(in[j]), second = Element::load(in[j + half]);
    out[j] = Element::store(first * cosine[j] + second * coupling[j]);
    out[j + half] = Element::store(second * cosine[j + half] + first * coupling[j + half]);
  }
  std::copy(in + job.rotated, in + job.width, out + job.rotated);
}

template <typename Element>
int turn(const Job& job, int threads) {
  using Stored = typename Element::Stored;
  using Wide = typename Element::Wide;
  const int64_t token = job.heads * job.width, grain = std::max<int64_t>(1, kElementsPerThread / token);
  std::atomic<int> status{kDone};
  ds_efficient::run_parallel(job.positions * job.samples, grain, threads, [=, &status](int64_t first, int64_t count) {
    try {
      std::vector<Wide> table(static_cast<size_t>(2 * job.rotated));
      Wide *const cosine = table.data(), *const coupling = cosine + job.rotated;
      for (int64_t i = first; i < first + count; ++i) {
        const int64_t position = i / job.samples, sample = i % job.samples;
        const int64_t row = job.index ? job.index[sample * job.positions + position] : position;
        fill(job, job.angles + row * job.angle_position + sample * job.angle_sample, cosine, coupling);
        const Stored* const in = static_cast<const Stored*>(job.t) + position * job.t_position + sample * job.t_sample;
        Stored* const out = static_cast<Stored*>(job.out) + i * token;
        for (int64_t head = 0; head < job.heads; ++head) {
          turn_head<Element>(job, in + head * job.t_head, cosine, coupling, out + head * job.width);
        }
      }
    } catch (const std::bad_alloc&) {
      status = kNoMemory;
    }
  });
  return status;
}

}  // namespace

extern "C" {

int ds_efficient_rotary_version() { return DS_EFFICIENT_ROTARY_VERSION; }

// Returns a Status. No size is 0; rotated is even and at most width; the caller has checked index.
int ds_efficient_rotary_turn(const void* t, int64_t t_position, int64_t t_sample, int64_t t_head, void* out,
                             const float* angles, int64_t angle_position, int64_t angle_sample, const int64_t* index,
                             int64_t length, int64_t positions, int64_t samples, int64_t heads, int64_t width,
                             int64_t rotated, double scale, int transposed, int dtype, int threads) {
  const Job job{t,         t_position, t_sample, t_head, out,   angles,  angle_position, angle_sample,   index, length,
                positions, samples,    heads,    width,  rotated, scale, transposed != 0};
  switch (dtype) {
    case kFloat32: return turn<Float32>(job, threads);
    case kBfloat16: return turn<Bfloat16>(job, threads);
    case kFloat16: return turn<Float16>(job, threads);
    case kFloat64: return turn<Float64>(job, threads);
    default: return kUnknown;
  }
}

}  // extern "C"
