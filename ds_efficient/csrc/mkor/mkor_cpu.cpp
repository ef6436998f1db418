// The grouped rank-1 update on the CPU; see mkor_common.h. C ABI, no torch headers.
//
// Two passes over M: it is read for M v, then read and written: 3 d^2 elements of memory traffic where M does not fit
// in the cache. Threads share the elements of all factors.
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "mkor_common.h"
#include "parallel.h"

namespace {

using namespace ds_efficient;

constexpr int64_t kGrain = 1 << 17;  // fewer elements than this are not worth a thread
constexpr int kLanes = 32, kRun = 512;

struct Factor {
  void* matrix;
  const float* v;
  float* u;
  int64_t size, first;  // first: elements of the factors before
};

// visit(factor number, row) for all rows of all factors.
template <typename Visit>
void for_rows(const std::vector<Factor>& factors, int threads, Visit visit) {
  const Factor& last = factors.back();
  const int64_t total = last.first + last.size * last.size;
  run_parallel(total, kGrain, threads, [=, &factors](int64_t first, int64_t count) {
    for (size_t f = 0; f < factors.size(); ++f) {  // rows that begin in first .. first + count - 1
      const int64_t size = factors[f].size, start = first - factors[f].first, end = start + count;
      if (end <= 0 || start >= size * size) continue;
      const int64_t from = start <= 0 ? 0 : (start + size - 1) / size;
      const int64_t to = std::min(size, (end + size - 1) / size);
      for (int64_t row = from; row < to; ++row) visit(f, row);
    }
  });
}

template <typename T>
double row_product(const T* row, const float* v, int64_t size) {
  double sum = 0.0;
  for (int64_t first = 0; first < size; first += kRun) {
    const int64_t end = std::min(size, first + kRun), even = first + (end - first) / kLanes * kLanes;
    float lanes[kLanes] = {};
    for (int64_t j = first; j < even; j += kLanes) {
      for (int e = 0; e < kLanes; ++e) lanes[e] = __builtin_fmaf(mkor::to_float(row[j + e]), v[j + e], lanes[e]);
    }
    for (int64_t j = even; j < end; ++j) lanes[0] = __builtin_fmaf(mkor::to_float(row[j]), v[j], lanes[0]);
    for (const float lane : lanes) sum += static_cast<double>(lane);
  }
  return sum;
}

// Subtracts the row of w w^T; `w` is that of all columns. Returns the largest |element|.
template <typename T>
float update_row(T* row, int64_t place, int64_t size, const mkor::Step& step, const float* w) {
  const float mine = w[place];
  const T diagonal = row[place];
  int32_t most = 0;  // absolute values order as their bits do
  for (int64_t j = 0; j < size; ++j) {
    row[j] = mkor::round_to<T>(mkor::updated(mkor::to_float(row[j]), step.scale, 0.0f, mine, w[j]));
    most = std::max(most, keyed::bits_of(mkor::to_float(row[j])) & 0x7fffffff);
  }
  if (step.shift != 0.0f) {
    row[place] = mkor::round_to<T>(mkor::updated(mkor::to_float(diagonal), step.scale, step.shift, mine, mine));
    most = 0;
    for (int64_t j = 0; j < size; ++j) most = std::max(most, keyed::bits_of(mkor::to_float(row[j])) & 0x7fffffff);
  }
  return keyed::float_of(most);
}

template <typename T>
void update(const std::vector<Factor>& factors, const mkor::Rule& rule, float* largest, int32_t* outcome, int threads) {
  for_rows(factors, threads, [&](size_t f, int64_t row) {
    const Factor& factor = factors[f];
    const double product = row_product(static_cast<const T*>(factor.matrix) + row * factor.size, factor.v, factor.size);
    factor.u[row] = mkor::blended_product(rule, mkor::blends(rule, largest[f]), product, factor.v[row]);
  });
  std::vector<mkor::Step> steps(factors.size());
  const auto most = std::make_unique<std::atomic<int32_t>[]>(factors.size());
  for (size_t f = 0; f < factors.size(); ++f) {
    const Factor& factor = factors[f];
    double q = 0.0, square = 0.0;
    for (int64_t i = 0; i < factor.size; ++i) {
      const double v = static_cast<double>(factor.v[i]);
      q += static_cast<double>(factor.u[i]) * v;
      square += v * v;
    }
    steps[f] = mkor::decide(rule, mkor::limits_of<T>(), largest[f], q, square);
    for (int64_t i = 0; i < factor.size; ++i) factor.u[i] = static_cast<float>(steps[f].factor * factor.u[i]);
    outcome[f] = steps[f].outcome;
    most[f] = 0;
  }
  for_rows(factors, threads, [&](size_t f, int64_t row) {
    const Factor& factor = factors[f];
    if (steps[f].outcome == mkor::kLeft) return;
    T* const place = static_cast<T*>(factor.matrix) + row * factor.size;
    const int32_t mine = keyed::bits_of(update_row(place, row, factor.size, steps[f], factor.u));
    int32_t known = most[f].load(std::memory_order_relaxed);
    while (known < mine && !most[f].compare_exchange_weak(known, mine, std::memory_order_relaxed)) {
    }
  });
  for (size_t f = 0; f < factors.size(); ++f) {
    if (steps[f].outcome != mkor::kLeft) largest[f] = keyed::float_of(most[f]);
  }
}

}  // namespace

extern "C" {

int ds_efficient_mkor_version() { return DS_EFFICIENT_MKOR_VERSION; }

// Update `count` factors in place. matrices, sizes: of each factor the address and d; vectors: all v one behind the
// other. Returns 0, 1 for an unknown dtype, 2 when memory runs out (then nothing has changed).
int ds_efficient_mkor_update(void* const* matrices, const int64_t* sizes, int64_t count, const float* vectors,
                             float* largest, int32_t* outcome, double gamma, double threshold, double zeta, int dtype,
                             int threads) {
  if (dtype < mkor::kFloat32 || dtype > mkor::kFloat16) return 1;
  if (count == 0) return 0;
  try {
    std::vector<Factor> factors(static_cast<size_t>(count));
    int64_t elements = 0, rows = 0;
    for (int64_t f = 0; f < count; ++f) rows += sizes[f];
    std::vector<float> u(static_cast<size_t>(rows));
    rows = 0;
    for (int64_t f = 0; f < count; ++f) {
      factors[f] = Factor{matrices[f], vectors + rows, u.data() + rows, sizes[f], elements};
      elements += sizes[f] * sizes[f];
      rows += sizes[f];
    }
    const mkor::Rule rule{gamma, threshold, zeta};
    if (dtype == mkor::kFloat32) {
      update<float>(factors, rule, largest, outcome, threads);
    } else if (dtype == mkor::kBfloat16) {
      update<mkor::Bfloat16>(factors, rule, largest, outcome, threads);
    } else {
      update<mkor::Float16>(factors, rule, largest, outcome, threads);
    }
  } catch (const std::bad_alloc&) {
    return 2;
  }
  return 0;
}

}  // extern "C"
