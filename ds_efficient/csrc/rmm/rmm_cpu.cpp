// Random sketches on the CPU; C ABI, no torch headers. See rmm_common.h for S and for the functions.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "parallel.h"
#include "rmm_cpu.h"

namespace {

using namespace ds_efficient::rmm;
using ds_efficient::run_parallel;
using namespace ds_efficient;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileColumns = 8;  // 24 sums in 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileColumns = 4;  // 12 sums in 16 registers
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileColumns = 8;
#else
constexpr int kVectorBytes = 16, kTileColumns = 4;
#endif
constexpr int kTileVectors = 3;
constexpr int kPackedTiles = 8;          // copied together, since rows of x lie in different pages
constexpr int64_t kWidth = 2048;         // features at a time: the sums of a panel stay in the second-level cache
constexpr int64_t kCacheBytes = 1 << 18;  // of a thread's buffer in the other sketches
constexpr int64_t kPerThread = 1 << 16;  // fewer elements of x than this are not worth a thread

enum Status { kDone = 0, kUnknown = 1, kNoMemory = 2 };

// Keep a value in a register: a compiler that reads it from memory in each of its uses is bound by the loads.
#if defined(__x86_64__)
#define DS_EFFICIENT_IN_REGISTER(value) asm("" : "+x"(value))
#else
#define DS_EFFICIENT_IN_REGISTER(value) (void)(value)
#endif

template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T))));  // loads and stores unaligned
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(T));
  static constexpr int kTile = kTileVectors * kCount;  // features of a register tile
};

// x (rows of the segment, features), out (blocks * projected, features).
template <typename Element>
struct Matrices {
  const typename Element::Stored* x;
  int64_t stride, features, blocks;
  double scale;
  typename Element::Stored* out;
};

// Call work(block, first feature, features, thread's buffers) for all blocks and for ranges of at most `widest`
// features, shared among threads; Buffers is made once a thread.
template <typename Buffers, typename Element, typename Work>
int for_tasks(const Segment& s, const Matrices<Element>& m, int64_t widest, int threads, Work work) {
  const int64_t blocks = std::max<int64_t>(1, m.blocks);
  const int64_t wanted = threads == 1 ? 1 : (2 * threads + blocks - 1) / blocks;  // each range makes S anew
  const int64_t line = 64 / static_cast<int64_t>(sizeof(typename Element::Stored));
  const int64_t share = ((m.features + wanted - 1) / wanted + line - 1) / line * line;
  const int64_t width = std::max<int64_t>(1, std::min(widest, share));
  const int64_t ranges = (m.features + width - 1) / width;
  std::atomic<int> status{kDone};
  const int64_t grain = std::max<int64_t>(1, kPerThread / std::max<int64_t>(1, s.block * width));
  run_parallel(m.blocks * ranges, grain, threads, [&](int64_t first, int64_t count) {
    try {
      Buffers buffers(s, width);
      for (int64_t task = first; task < first + count; ++task) {
        const int64_t feature = task % ranges * width;
        work(task / ranges, feature, std::min(width, m.features - feature), buffers);
      }
    } catch (const std::bad_alloc&) {
      status = kNoMemory;
    }
  });
  return status;
}

// One row of the result.
template <typename Element>
void write_row(const typename Element::Wide* from, int64_t count, double scale, typename Element::Stored* out) {
  const auto factor = static_cast<typename Element::Wide>(scale);
  for (int64_t i = 0; i < count; ++i) out[i] = Element::store(from[i] * factor);
}

// ---- S^T X with S made in panels: a matrix product in register tiles --------------------------------------------

template <typename T>
struct ProductBuffers {
  ProductBuffers(const Segment&, int64_t width)
      : padded((width + Lanes<T>::kTile - 1) / Lanes<T>::kTile * Lanes<T>::kTile),
        raw(static_cast<size_t>(kPanelRows * kPanelColumns)),
        s(static_cast<size_t>(kPanelRows * kPanelColumns)),
        x(static_cast<size_t>(kPanelRows * kPackedTiles * Lanes<T>::kTile)),
        sums(static_cast<size_t>(kPanelColumns * padded)) {}
  int64_t padded;          // features of a row of sums
  std::vector<float> raw;  // (rows, columns)
  std::vector<T> s;        // (columns / kTileColumns, rows, kTileColumns)
  std::vector<T> x;        // (kPackedTiles, rows, kTile)
  std::vector<T> sums;     // (columns, padded)
};

// sums (kTileColumns, stride) += s (rows, kTileColumns)^T x (rows, kTile).
template <typename T>
void multiply_tile(const T* s, const T* x, int64_t rows, T* sums, int64_t stride) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector sum[kTileColumns][kTileVectors];
  for (int c = 0; c < kTileColumns; ++c) {
    for (int v = 0; v < kTileVectors; ++v) {
      sum[c][v] = *reinterpret_cast<const Vector*>(sums + c * stride + v * kLanes);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Vector row[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      row[v] = *reinterpret_cast<const Vector*>(x + r * Lanes<T>::kTile + v * kLanes);
      DS_EFFICIENT_IN_REGISTER(row[v]);
    }
    for (int c = 0; c < kTileColumns; ++c) {
      const T factor = s[r * kTileColumns + c];
      for (int v = 0; v < kTileVectors; ++v) sum[c][v] += row[v] * factor;
    }
  }
  for (int c = 0; c < kTileColumns; ++c) {
    for (int v = 0; v < kTileVectors; ++v) {
      *reinterpret_cast<Vector*>(sums + c * stride + v * kLanes) = sum[c][v];
    }
  }
}

// One row of a tile: `count` elements, the rest 0.
template <typename Element>
inline void pack(const typename Element::Stored* from, int64_t count, typename Element::Wide* to) {
  constexpr int64_t kTile = Lanes<typename Element::Wide>::kTile;
  if (count == kTile) {
    for (int64_t i = 0; i < kTile; ++i) to[i] = Element::load(from[i]);
  } else {
    for (int64_t i = 0; i < kTile; ++i) to[i] = i < count ? Element::load(from[i]) : 0;
  }
}

// Sums of columns first .. of the block over rows row .. of the segment.
template <typename Element>
void multiply_panel(const Segment& segment, const Matrices<Element>& m, int64_t row, int64_t rows, int64_t first,
                    int64_t columns, int64_t feature, int64_t features,
                    ProductBuffers<typename Element::Wide>& buffers) {
  using Wide = typename Element::Wide;
  constexpr int64_t kTile = Lanes<Wide>::kTile;
  unit_panel<Element>(segment, row, rows, first, columns, buffers.raw.data());
  const int64_t tiles = (columns + kTileColumns - 1) / kTileColumns;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t start = tile * kTileColumns, count = std::min<int64_t>(kTileColumns, columns - start);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = buffers.raw.data() + r * columns + start;
      Wide* const to = buffers.s.data() + (tile * rows + r) * kTileColumns;
      for (int c = 0; c < kTileColumns; ++c) to[c] = c < count ? static_cast<Wide>(from[c]) : Wide{0};
    }
  }
  for (int64_t start = 0; start < features; start += kPackedTiles * kTile) {
    const int64_t packed = std::min<int64_t>(kPackedTiles, (features - start + kTile - 1) / kTile);
    for (int64_t r = 0; r < rows; ++r) {
      const auto* const from = m.x + (row + r) * m.stride + feature + start;
      for (int64_t t = 0; t < packed; ++t) {
        pack<Element>(from + t * kTile, std::min(kTile, features - start - t * kTile),
                      buffers.x.data() + (t * rows + r) * kTile);
      }
    }
    for (int64_t t = 0; t < packed; ++t) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        multiply_tile(buffers.s.data() + tile * rows * kTileColumns, buffers.x.data() + t * rows * kTile, rows,
                      buffers.sums.data() + tile * kTileColumns * buffers.padded + start + t * kTile, buffers.padded);
      }
    }
  }
}

template <typename Element>
int apply_product(const Segment& s, const Matrices<Element>& m, int threads) {
  using Wide = typename Element::Wide;
  using Buffers = ProductBuffers<Wide>;
  return for_tasks<Buffers>(s, m, kWidth, threads, [&](int64_t block, int64_t feature, int64_t features, Buffers& b) {
    for (int64_t first = 0; first < s.projected; first += kPanelColumns) {
      const int64_t columns = std::min(kPanelColumns, s.projected - first);
      std::fill(b.sums.begin(), b.sums.end(), Wide{0});
      for (int64_t local = 0; local < s.block; local += kPanelRows) {
        const int64_t rows = std::min(kPanelRows, s.block - local);
        multiply_panel(s, m, block * s.block + local, rows, first, columns, feature, features, b);
      }
      for (int64_t c = 0; c < columns; ++c) {
        write_row<Element>(b.sums.data() + c * b.padded, features, m.scale,
                           m.out + (block * s.projected + first + c) * m.features + feature);
      }
    }
  });
}

// ---- count sketch: every row is added to, or subtracted from, one row of the sums -------------------------------

template <typename T>
struct RowBuffers {
  RowBuffers(const Segment& s, int64_t width) : sums(static_cast<size_t>(s.projected * width)) {}
  std::vector<T> sums;  // (projected, features of the task)
};

template <typename Element>
int apply_count(const Segment& s, const Matrices<Element>& m, int threads) {
  using Wide = typename Element::Wide;
  using Buffers = RowBuffers<Wide>;
  const int64_t widest = std::max<int64_t>(64, kCacheBytes / static_cast<int64_t>(sizeof(Wide)) / s.projected);
  return for_tasks<Buffers>(s, m, widest, threads, [&](int64_t block, int64_t feature, int64_t features, Buffers& b) {
    std::fill(b.sums.begin(), b.sums.end(), Wide{0});
    for (int64_t row = block * s.block; row < (block + 1) * s.block; ++row) {
      const uint32_t word = word_at(s.key, static_cast<uint64_t>(s.base_row + row));
      const auto* const from = m.x + row * m.stride + feature;
      Wide* const to = b.sums.data() + count_column(word, s.projected) * features;
      if (count_negative(word)) {
        for (int64_t i = 0; i < features; ++i) to[i] -= Element::load(from[i]);
      } else {
        for (int64_t i = 0; i < features; ++i) to[i] += Element::load(from[i]);
      }
    }
    for (int64_t c = 0; c < s.projected; ++c) {
      write_row<Element>(b.sums.data() + c * features, features, m.scale,
                         m.out + (block * s.projected + c) * m.features + feature);
    }
  });
}

struct NoBuffers { NoBuffers(const Segment&, int64_t) {} };

template <typename Element>
int apply_rows(const Segment& s, const Matrices<Element>& m, int threads) {
  const auto factor = static_cast<typename Element::Wide>(m.scale);
  return for_tasks<NoBuffers>(s, m, kWidth, threads, [&](int64_t block, int64_t feature, int64_t features, NoBuffers&) {
    for (int64_t c = block * s.projected; c < (block + 1) * s.projected; ++c) {
      const auto* const from = m.x + (block * s.block + s.chosen[c]) * m.stride + feature;
      auto* const to = m.out + c * m.features + feature;
      for (int64_t i = 0; i < features; ++i) to[i] = Element::store(Element::load(from[i]) * factor);
    }
  });
}

// ---- subsampled Hadamard transform ------------------------------------------------------------------------------

template <typename T>
struct TransformBuffers {
  TransformBuffers(const Segment& s, int64_t width) : values(static_cast<size_t>(padded_rows(s.block) * width)) {}
  std::vector<T> values;  // (padded rows, features of the task)
};

// The transform along the rows of values (n, width), n a power of two; two levels in one pass over memory.
template <typename T>
void hadamard(T* values, int64_t n, int64_t width) {
  int64_t half = 1;
  for (; 4 * half <= n; half *= 4) {
    for (int64_t start = 0; start < n; start += 4 * half) {
      for (int64_t r = start; r < start + half; ++r) {
        T* __restrict__ const a = values + r * width;
        T* __restrict__ const b = a + half * width;
        T* __restrict__ const c = b + half * width;
        T* __restrict__ const d = c + half * width;
        for (int64_t i = 0; i < width; ++i) {
          const T sum0 = a[i] + b[i], difference0 = a[i] - b[i], sum1 = c[i] + d[i], difference1 = c[i] - d[i];
          a[i] = sum0 + sum1;
          b[i] = difference0 + difference1;
          c[i] = sum0 - sum1;
          d[i] = difference0 - difference1;
        }
      }
    }
  }
  const int64_t left = 2 * half == n ? half * width : 0;  // the last level of an odd number
  T *__restrict__ const low = values, *__restrict__ const high = values + left;
  for (int64_t i = 0; i < left; ++i) {
    const T sum = low[i] + high[i], difference = low[i] - high[i];
    low[i] = sum;
    high[i] = difference;
  }
}

template <typename Element>
int apply_hadamard(const Segment& s, const Matrices<Element>& m, int threads) {
  using Wide = typename Element::Wide;
  using Buffers = TransformBuffers<Wide>;
  const int64_t n = padded_rows(s.block);
  const int64_t widest = std::max<int64_t>(16, kCacheBytes / static_cast<int64_t>(sizeof(Wide)) / n);
  return for_tasks<Buffers>(s, m, widest, threads, [&](int64_t block, int64_t feature, int64_t features, Buffers& b) {
    for (int64_t local = 0; local < s.block; ++local) {
      const int64_t row = block * s.block + local, i = s.base_row + row;
      const bool negative = negative_bit(word_at(s.key, static_cast<uint64_t>(i) / 32), i);
      const auto* const from = m.x + row * m.stride + feature;
      Wide* const to = b.values.data() + local * features;
      if (negative) {
        for (int64_t f = 0; f < features; ++f) to[f] = -Element::load(from[f]);
      } else {
        for (int64_t f = 0; f < features; ++f) to[f] = Element::load(from[f]);
      }
    }
    std::fill(b.values.begin() + s.block * features, b.values.begin() + n * features, Wide{0});
    hadamard(b.values.data(), n, features);
    for (int64_t c = block * s.projected; c < (block + 1) * s.projected; ++c) {
      write_row<Element>(b.values.data() + s.chosen[c] * features, features, m.scale,
                         m.out + c * m.features + feature);
    }
  });
}

// ---- S itself ---------------------------------------------------------------------------------------------------

template <typename Element>
int fill_matrix(const Segment& s, int64_t first, int64_t rows, void* out, int threads) {
  auto* const target = static_cast<typename Element::Stored*>(out);
  std::atomic<int> status{kDone};
  run_parallel(rows, kPerThread / 4 / s.projected + 1, threads, [&](int64_t start, int64_t count) {
    try {
      std::vector<float> panel(static_cast<size_t>(kPanelRows * kPanelColumns));
      for (int64_t row = start; row < start + count; row += kPanelRows) {
        const int64_t some = std::min(kPanelRows, start + count - row);
        for (int64_t column = 0; column < s.projected; column += kPanelColumns) {
          const int64_t columns = std::min(kPanelColumns, s.projected - column);
          unit_panel<Element>(s, first + row, some, column, columns, panel.data());
          for (int64_t r = 0; r < some; ++r) {
            write_row<Element>(panel.data() + r * columns, columns, 1.0, target + (row + r) * s.projected + column);
          }
        }
      }
    } catch (const std::bad_alloc&) {
      status = kNoMemory;
    }
  });
  return status;
}

template <typename Element>
int apply(const Segment& s, bool fast, const void* x, int64_t stride, int64_t features, int64_t blocks, double scale,
          void* out, int threads) {
  using Stored = typename Element::Stored;
  const Matrices<Element> m{static_cast<const Stored*>(x), stride, features, blocks, scale, static_cast<Stored*>(out)};
  if (fast) return apply_hadamard(s, m, threads);
  if (s.sketch == kRows) return apply_rows(s, m, threads);
  return s.sketch == kCount ? apply_count(s, m, threads) : apply_product(s, m, threads);
}

int project(const Segment& s, bool fast, const void* x, int64_t stride, int64_t features, int64_t blocks, double scale,
            void* out, int dtype, int threads) {
  switch (dtype) {
    case kFloat32: return apply<Float32>(s, fast, x, stride, features, blocks, scale, out, threads);
    case kBfloat16: return apply<Bfloat16>(s, fast, x, stride, features, blocks, scale, out, threads);
    case kFloat16: return apply<Float16>(s, fast, x, stride, features, blocks, scale, out, threads);
    case kFloat64: return apply<Float64>(s, fast, x, stride, features, blocks, scale, out, threads);
    default: return kUnknown;
  }
}

}  // namespace

extern "C" {

int ds_efficient_rmm_version() { return DS_EFFICIENT_RMM_VERSION; }

int ds_efficient_rmm_matrix(uint64_t key, const Units* units, const int64_t* chosen, void* out, int threads) {
  const int sketch = static_cast<int>(units->sketch);
  if (sketch < kGaussian || sketch > kCount) return kUnknown;
  const Segment s{key, sketch, units->base_row, units->before, units->block, units->projected, chosen};
  switch (units->dtype) {
    case kFloat32: return fill_matrix<Float32>(s, units->first, units->rows, out, threads);
    case kBfloat16: return fill_matrix<Bfloat16>(s, units->first, units->rows, out, threads);
    case kFloat16: return fill_matrix<Float16>(s, units->first, units->rows, out, threads);
    default: return kUnknown;
  }
}

int ds_efficient_rmm_apply(const void* x, int64_t stride, int64_t features, uint64_t key, int sketch, int64_t base_row,
                           uint64_t before, int64_t block, int64_t projected, const int64_t* chosen, int64_t blocks,
                           double scale, void* out, int dtype, int threads) {
  if (sketch < kGaussian || sketch > kCount) return kUnknown;
  const Segment s{key, sketch, base_row, before, block, projected, chosen};
  return project(s, false, x, stride, features, blocks, scale, out, dtype, threads);
}

int ds_efficient_rmm_rows(const void* x, int64_t stride, int64_t features, int64_t block, int64_t projected,
                          const int64_t* chosen, int64_t blocks, double scale, void* out, int dtype, int threads) {
  const Segment s{0, kRows, 0, 0, block, projected, chosen};
  return project(s, false, x, stride, features, blocks, scale, out, dtype, threads);
}

int ds_efficient_rmm_hadamard(const void* x, int64_t stride, int64_t features, uint64_t key, int64_t base_row,
                              int64_t block, int64_t projected, const int64_t* chosen, int64_t blocks, double scale,
                              void* out, int dtype, int threads) {
  const Segment s{key, kSrht, base_row, 0, block, projected, chosen};
  return project(s, true, x, stride, features, blocks, scale, out, dtype, threads);
}

}  // extern "C"
