// Products with thin matrices on the CPU, each in one pass over the large one, with what error feedback does beside
// them. The large matrix is n x m by rows; p is n x r, q is r x m, both by rows; 1 <= r <= kMostRank. Bits do not depend on
// the number of threads. The functions are in the library of the orthonormal columns:
//
//   int ds_efficient_lgreco_project(const void* x, const float* error, double unscale, const float* q, int64_t n,
//                                   int64_t m, int64_t r, float* next, float* p, int dtype, int threads)
//     next = unscale * x + error, rounded once, and p = next q^T. error is null, next, or other memory.
//   int ds_efficient_lgreco_project_back(const float* x, const float* p, int64_t n, int64_t m, int64_t r, float* q,
//                                        int threads)
//     q = p^T x.
//   int ds_efficient_lgreco_rebuild(const float* p, const float* q, int64_t n, int64_t m, int64_t r, float* error,
//                                   double scale, void* out, int dtype, int threads)
//     mean = p q, by fused additions in the order of the columns of p: the same bits on every rank; error -= mean;
//     out = scale * mean, rounded to dtype.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "elements_cpu.h"
#include "parallel.h"

namespace ds_efficient {
namespace lgreco {

constexpr int64_t kMostRank = 16;  // above it libraries of matrix products are as fast
constexpr int64_t kBlock = 8;      // rows that are looked at together
constexpr int64_t kLargeGrain = 1 << 16;  // fewer elements than this are not worth a thread

// Eight numbers at any address.
typedef float Eight __attribute__((vector_size(32)));

inline Eight load_eight(const float* from) {
  Eight value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// work(integral constant) with r filled up to 8 or 16.
template <typename Work>
void with_rank(int64_t r, Work work) {
  if (r <= 8) work(std::integral_constant<int, 8>());
  else work(std::integral_constant<int, 16>());
}

struct Project {
  const void* x;
  const float* error;
  float unscale;
  const float* q;
  int64_t n, m, r;
  float *next, *p;
  int threads;

  template <typename Element>
  int run() const {
    with_rank(r, [&](auto rank) {
      constexpr int kWidth = decltype(rank)::value;
      std::vector<float> columns(static_cast<size_t>(m * kWidth));  // of q, filled with zeros
      for (int64_t k = 0; k < r; ++k) {
        for (int64_t j = 0; j < m; ++j) columns[static_cast<size_t>(j * kWidth + k)] = q[k * m + j];
      }
      const float* const factors = columns.data();
      const int64_t blocks = (n + kBlock - 1) / kBlock;
      run_parallel(blocks, std::max<int64_t>(1, kLargeGrain / (kBlock * m)), threads, [=](int64_t first, int64_t some) {
        for (int64_t block = first; block < first + some; ++block) rows<Element, kWidth>(block * kBlock, factors);
      });
    });
    return kDone;
  }

 private:
  template <typename Element, int kWidth>
  void rows(int64_t i, const float* factors) const {
    constexpr int kVectors = kWidth / 8;
    constexpr int64_t kRun = 64;
    const int64_t count = std::min(kBlock, n - i);
    float value[kBlock][kRun] = {};
    Eight sum[kVectors][kBlock] = {};
    for (int64_t j = 0; j < m; j += kRun) {
      const int64_t some = std::min(kRun, m - j);
      for (int64_t u = 0; u < count; ++u) correct<Element>((i + u) * m + j, some, value[u]);
      for (int v = 0; v < kVectors; ++v) {
        Eight part[kBlock];
        for (int u = 0; u < kBlock; ++u) part[u] = sum[v][u];
        for (int64_t e = 0; e < some; ++e) {
          const Eight factor = load_eight(factors + (j + e) * kWidth + 8 * v);
#pragma GCC unroll 8
          for (int u = 0; u < kBlock; ++u) part[u] += value[u][e] * factor;
        }
        for (int u = 0; u < kBlock; ++u) sum[v][u] = part[u];
      }
    }
    for (int64_t u = 0; u < count; ++u) {
      for (int64_t k = 0; k < r; ++k) p[(i + u) * r + k] = sum[k / 8][u][k % 8];
    }
  }

  template <typename Element>
  void correct(int64_t start, int64_t count, float* value) const {
    const auto* const from = static_cast<const typename Element::Stored*>(x) + start;
    if (error) {
      for (int64_t e = 0; e < count; ++e) value[e] = corrected(Element::load(from[e]), unscale, error[start + e]);
    } else {
      for (int64_t e = 0; e < count; ++e) value[e] = corrected(Element::load(from[e]), unscale, kNoError);
    }
    std::memcpy(next + start, value, static_cast<size_t>(count) * sizeof *value);
  }
};

struct ProjectBack {
  const float *x, *p;
  int64_t n, m, r;
  float* q;
  int threads;

  int run() const {
    std::fill(q, q + r * m, 0.0f);
    const int64_t grain = std::max<int64_t>(1, kLargeGrain / (8 * n));
    run_parallel((m + 7) / 8, grain, threads, [=](int64_t first, int64_t some) {
      for (int64_t i = 0; i < n; i += kBlock) rows(i, first * 8, std::min(m, (first + some) * 8));
    });
    return kDone;
  }

 private:
  void rows(int64_t i, int64_t start, int64_t end) const {
    const int64_t count = std::min(kBlock, n - i);
    float factor[kMostRank][kBlock] = {};
    for (int64_t k = 0; k < r; ++k) {
      for (int64_t u = 0; u < count; ++u) factor[k][u] = p[(i + u) * r + k];
    }
    int64_t j = start;
    for (; count == kBlock && j + 8 <= end; j += 8) {
      Eight row[kBlock];
      for (int u = 0; u < kBlock; ++u) row[u] = load_eight(x + (i + u) * m + j);
      for (int64_t k = 0; k < r; ++k) {
        Eight even = load_eight(q + k * m + j), odd = {};
#pragma GCC unroll 4
        for (int u = 0; u < kBlock; u += 2) {
          even += factor[k][u] * row[u];
          odd += factor[k][u + 1] * row[u + 1];
        }
        even += odd;
        std::memcpy(q + k * m + j, &even, sizeof even);
      }
    }
    for (; j < end; ++j) {
      for (int64_t k = 0; k < r; ++k) {
        for (int64_t u = 0; u < count; ++u) q[k * m + j] += factor[k][u] * x[(i + u) * m + j];
      }
    }
  }
};

struct Rebuild {
  const float *p, *q;
  int64_t n, m, r;
  float* error;
  float scale;
  void* out;
  int threads;

  template <typename Element>
  int run() const {
    const int64_t grain = std::max<int64_t>(1, kLargeGrain / m);
    run_parallel(n, grain, threads, [=](int64_t first, int64_t some) {
      for (int64_t i = first; i < first + some; ++i) row<Element>(i);
    });
    return kDone;
  }

 private:
  template <typename Element>
  void row(int64_t i) const {
    constexpr int64_t kRun = 256;  // of q, which stays in the nearest cache for the next row
    float mean[kRun];
    auto* const to = static_cast<typename Element::Stored*>(out) + i * m;
    float* const left = error + i * m;
    for (int64_t j = 0; j < m; j += kRun) {
      const int64_t some = std::min(kRun, m - j);
      for (int64_t e = 0; e < some; ++e) mean[e] = p[i * r] * q[j + e];
      int64_t k = 1;
      for (; k + 4 <= r; k += 4) {
        const float *const f = p + i * r + k, *const from = q + k * m + j;
        for (int64_t e = 0; e < some; ++e) {
          float sum = keyed::fma_rn(f[0], from[e], mean[e]);
          sum = keyed::fma_rn(f[1], from[m + e], sum);
          sum = keyed::fma_rn(f[2], from[2 * m + e], sum);
          mean[e] = keyed::fma_rn(f[3], from[3 * m + e], sum);
        }
      }
      for (; k < r; ++k) {
        for (int64_t e = 0; e < some; ++e) mean[e] = keyed::fma_rn(p[i * r + k], q[k * m + j + e], mean[e]);
      }
      for (int64_t e = 0; e < some; ++e) left[j + e] -= mean[e];
      for (int64_t e = 0; e < some; ++e) to[j + e] = Element::store(mean[e] * scale);
    }
  }
};

}  // namespace lgreco
}  // namespace ds_efficient
