// The k largest entries by magnitude on the CPU; C ABI, no torch headers. See topk_common.h.
//
// A sample bounds the k-th largest magnitude from below; two passes, which vectorise, count and copy what reaches the
// bound, or with error feedback the one that adds the errors; the k-th largest of that is selected. Where the sample
// misleads, or much is kept, the bound is 0.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <utility>
#include <vector>

#include "elements_cpu.h"
#include "parallel.h"
#include "topk_common.h"

namespace {

using namespace ds_efficient::lgreco;
using namespace ds_efficient;

constexpr int64_t kGrain = 1 << 16;  // fewer elements than this are not worth a thread
constexpr int64_t kSampledFrom = 1 << 16, kMostSamples = 1 << 13;
constexpr int64_t kOfOneSample = 64;  // a sample is a cache miss: more of them cost more than they narrow
constexpr int64_t kRun = 64;  // elements that are looked at together

template <typename Element>
uint32_t magnitude_at(const typename Element::Stored* x, int64_t i) {
  return magnitude_of(Element::load(x[i]));
}

// A lower bound that about k of n elements reach; 0 where a sample is not worth its cost. magnitude(i): of element i.
template <typename Magnitude>
uint32_t sampled_bound(int64_t n, int64_t k, Magnitude magnitude) {
  if (n < kSampledFrom || 4 * k > n) return 0;
  const int64_t samples = std::min(kMostSamples, n / kOfOneSample);
  std::vector<uint32_t> sample(static_cast<size_t>(samples));
  for (int64_t j = 0; j < samples; ++j) sample[static_cast<size_t>(j)] = magnitude(sampled_place(j, n / samples));
  const double expected = static_cast<double>(samples) * static_cast<double>(k) / static_cast<double>(n);
  const auto rank = static_cast<int64_t>(std::ceil(expected + 4 * std::sqrt(expected) + 4));
  const auto place = sample.begin() + (std::min(rank, samples) - 1);
  std::nth_element(sample.begin(), place, sample.end(), std::greater<uint32_t>());
  return *place;
}

// How many of the elements first .. end - 1 reach the bound.
template <typename Element>
int64_t count_from(const typename Element::Stored* x, int64_t first, int64_t end, uint32_t bound) {
  int64_t count = 0;
  for (int64_t i = first; i < end; i += kRun) {
    const int64_t some = std::min(kRun, end - i);
    uint32_t found = 0;
    for (int64_t e = 0; e < some; ++e) found += magnitude_at<Element>(x, i + e) >= bound ? 1u : 0u;
    count += found;
  }
  return count;
}

template <typename Element>
void copy_from(const typename Element::Stored* x, int64_t first, int64_t end, uint32_t bound, uint32_t* index,
               uint32_t* magnitude) {
  uint32_t some_magnitudes[kRun];
  for (int64_t i = first; i < end; i += kRun) {
    const int64_t some = std::min(kRun, end - i);
    uint32_t largest = 0;
    for (int64_t e = 0; e < some; ++e) {
      some_magnitudes[e] = magnitude_at<Element>(x, i + e);
      largest = std::max(largest, some_magnitudes[e]);
    }
    if (largest < bound) continue;
    for (int64_t e = 0; e < some; ++e) {
      if (some_magnitudes[e] < bound) continue;
      *index++ = static_cast<uint32_t>(i + e);
      *magnitude++ = some_magnitudes[e];
    }
  }
}

struct Candidates {
  std::vector<uint32_t> index, magnitude;  // ascending indices
};

template <typename Element>
Candidates candidates_of(const typename Element::Stored* x, int64_t n, uint32_t bound, int threads) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / kGrain)), share = (n + parts - 1) / parts;
  std::vector<int64_t> before(static_cast<size_t>(parts) + 1);
  int64_t* const counts = before.data() + 1;
  ds_efficient::run_parallel(parts, 1, threads, [=](int64_t part, int64_t some) {
    for (const int64_t end = part + some; part < end; ++part) {
      counts[part] = count_from<Element>(x, part * share, std::min(n, (part + 1) * share), bound);
    }
  });
  for (int64_t part = 0; part < parts; ++part) counts[part] += part ? counts[part - 1] : 0;
  Candidates made;
  made.index.resize(static_cast<size_t>(before.back()));
  made.magnitude.resize(made.index.size());
  uint32_t* const index = made.index.data();
  uint32_t* const magnitude = made.magnitude.data();
  const int64_t* const starts = before.data();
  ds_efficient::run_parallel(parts, 1, threads, [=](int64_t part, int64_t some) {
    for (const int64_t end = part + some; part < end; ++part) {
      copy_from<Element>(x, part * share, std::min(n, (part + 1) * share), bound, index + starts[part],
                         magnitude + starts[part]);
    }
  });
  return made;
}

// Writes `unscale * x + error` of elements first .. end - 1 and appends those that reach the bound, in one pass.
template <typename Element>
void correct(const typename Element::Stored* x, const float* error, float unscale, int64_t first, int64_t end,
             uint32_t bound, float* next, Candidates& found) {
  float value[kRun];  // beside `error` and `next`, which may be the same memory, so that the loops vectorise
  uint32_t magnitude[kRun];
  size_t count = 0;
  for (int64_t i = first; i < end; i += kRun) {
    const int64_t some = std::min(kRun, end - i);
    uint32_t largest = 0;
    for (int64_t e = 0; e < some; ++e) {
      value[e] = corrected(Element::load(x[i + e]), unscale, error ? error[i + e] : kNoError);
      magnitude[e] = magnitude_of(value[e]);
      largest = std::max(largest, magnitude[e]);
    }
    std::memcpy(next + i, value, static_cast<size_t>(some) * sizeof *next);
    if (largest < bound) continue;
    if (count + kRun > found.index.size()) {
      found.index.resize(2 * count + kRun);
      found.magnitude.resize(found.index.size());
    }
    for (int64_t e = 0; e < some; ++e) {
      found.index[count] = static_cast<uint32_t>(i + e);
      found.magnitude[count] = magnitude[e];
      count += magnitude[e] >= bound ? 1 : 0;
    }
  }
  found.index.resize(count);
  found.magnitude.resize(count);
}

// Writes all of `unscale * x + error`; returns at least k candidates.
template <typename Element>
Candidates corrected_candidates(const typename Element::Stored* x, const float* error, float unscale, int64_t n,
                                int64_t k, float* next, int threads) {
  const uint32_t bound = sampled_bound(n, k, [=](int64_t i) {
    return magnitude_of(corrected(Element::load(x[i]), unscale, error ? error[i] : kNoError));
  });
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n / kGrain)), share = (n + parts - 1) / parts;
  std::vector<Candidates> made(static_cast<size_t>(parts));
  std::atomic<bool> enough{true};  // memory
  Candidates* const all = made.data();
  ds_efficient::run_parallel(parts, 1, threads, [=, &enough](int64_t part, int64_t some) {
    for (const int64_t end = part + some; part < end; ++part) {
      try {
        correct<Element>(x, error, unscale, part * share, std::min(n, (part + 1) * share), bound, next, all[part]);
      } catch (const std::bad_alloc&) {
        enough = false;  // it must not leave a thread
      }
    }
  });
  if (!enough) throw std::bad_alloc();
  Candidates& found = made[0];
  for (size_t part = 1; part < made.size(); ++part) {
    found.index.insert(found.index.end(), made[part].index.begin(), made[part].index.end());
    found.magnitude.insert(found.magnitude.end(), made[part].magnitude.begin(), made[part].magnitude.end());
  }
  if (static_cast<int64_t>(found.index.size()) < k) return candidates_of<Float32>(next, n, 0, threads);
  return std::move(found);
}

// The payload from at least k candidates. `next`: null, or where zeros replace what is selected.
template <typename Element>
void take(const typename Element::Stored* x, const Candidates& found, int64_t k, uint32_t* indices, float* next) {
  std::vector<uint32_t> order = found.magnitude;
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<uint32_t>());
  const uint32_t threshold = order[static_cast<size_t>(k - 1)];
  int64_t ties = k;
  for (const uint32_t magnitude : found.magnitude) ties -= magnitude > threshold;
  auto* const values = reinterpret_cast<typename Element::Stored*>(indices + k);
  int64_t place = 0;
  for (size_t i = 0; i < found.index.size(); ++i) {
    const uint32_t magnitude = found.magnitude[i], index = found.index[i];
    if (magnitude < threshold || (magnitude == threshold && ties-- <= 0)) continue;
    indices[place] = index;
    std::memcpy(values + place++, x + index, sizeof *values);
    if (next) next[index] = 0.0f;
  }
}

struct Select {
  const void* x;
  const float* error;
  float* next;
  float unscale;
  int64_t n, k;
  uint32_t* indices;
  int threads;

  template <typename Element>
  int run() const {
    const auto* const from = static_cast<const typename Element::Stored*>(x);
    try {
      if (next) {
        const Candidates found = corrected_candidates<Element>(from, error, unscale, n, k, next, threads);
        take<Float32>(next, found, k, indices, next);
        return kDone;
      }
      const uint32_t bound = sampled_bound(n, k, [=](int64_t i) { return magnitude_at<Element>(from, i); });
      Candidates found = candidates_of<Element>(from, n, bound, threads);
      if (static_cast<int64_t>(found.index.size()) < k) found = candidates_of<Element>(from, n, 0, threads);
      take<Element>(from, found, k, indices, nullptr);
      return kDone;
    } catch (const std::bad_alloc&) {
      return kNoMemory;
    }
  }
};

template <typename Element>
struct ScatterTo {
  const uint32_t* indices;
  int64_t k, n;
  float weight;
  bool accumulate;
  void* out;

  template <typename Out>
  int run() const {
    const auto* const values = reinterpret_cast<const typename Element::Stored*>(indices + k);
    auto* const to = static_cast<typename Out::Stored*>(out);
    for (int64_t i = 0; i < k; ++i) {
      const uint32_t index = indices[i];
      if (index >= n) continue;
      const float before = accumulate ? Out::load(to[index]) : kNoError;
      to[index] = Out::store(keyed::fma_rn(Element::load(values[i]), weight, before));
    }
    return kDone;
  }
};

struct Scatter {
  const void* payload;
  int64_t k, n;
  float weight;
  bool accumulate;
  void* out;
  int out_dtype;

  template <typename Element>
  int run() const {
    const ScatterTo<Element> work{static_cast<const uint32_t*>(payload), k, n, weight, accumulate, out};
    return with_element(work, out_dtype);
  }
};

bool has_code(int64_t n, int64_t k) { return k >= 1 && n >= k && n < int64_t{1} << 31; }

}  // namespace

extern "C" {

int ds_efficient_lgreco_topk_version() { return DS_EFFICIENT_LGRECO_TOPK_VERSION; }

int ds_efficient_lgreco_select(const void* x, const float* error, float* new_error, double unscale, int64_t n,
                               int64_t k, void* payload, int dtype, int threads) {
  if (!has_code(n, k)) return kUnknown;
  const Select work{x, error, new_error, static_cast<float>(unscale), n, k, static_cast<uint32_t*>(payload), threads};
  return with_element(work, dtype);
}

int ds_efficient_lgreco_scatter(const void* payload, int64_t k, int64_t n, int dtype, double weight, int accumulate,
                                void* out, int out_dtype, int) {
  if (!has_code(n, k)) return kUnknown;
  const Scatter work{payload, k, n, static_cast<float>(weight), accumulate != 0, out, out_dtype};
  return with_element(work, dtype);
}

}  // extern "C"
