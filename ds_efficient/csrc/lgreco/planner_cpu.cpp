// L-GreCo's choice of one option a layer under a common error budget; C ABI, no torch headers.
//
// F[l][e] is the least cost of layers 0 .. l-1 whose cells sum to exactly e. Only sums that the layers before can reach
// and that leave the layers after enough room are kept: no plan is lost, since every layer takes at least its least
// cell. Sums of costs are taken in the order of the layers, so that the reference finds the same bits.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace {

enum Status { kDone = 0, kUnknown = 1, kNoMemory = 2 };
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kTile = 1024;  // sums at a time: their costs stay in the first-level cache

// The options of all layers: those of layer l are offsets[l] .. offsets[l + 1] - 1.
struct Options {
  int64_t layers;
  const int64_t* offsets;
  const int64_t* cells;
  const double* costs;
};

// The sums low .. high that are kept after a layer, and their costs.
struct Window {
  int64_t low, high;
  double* cost;
};

// The windows before the first layer and after each, without memory; empty when no plan fits the capacity.
std::vector<Window> windows(const Options& o, int64_t capacity) {
  std::vector<int64_t> least(o.layers), most(o.layers);
  int64_t after = 0;  // least sum of the layers still to come
  for (int64_t l = 0; l < o.layers; ++l) {
    const int64_t* first = o.cells + o.offsets[l];
    const int64_t* last = o.cells + o.offsets[l + 1];
    if (first == last) return {};
    least[l] = *std::min_element(first, last);
    most[l] = *std::max_element(first, last);
    if (least[l] > capacity - after) return {};
    after += least[l];
  }
  std::vector<Window> found{{0, 0, nullptr}};
  for (int64_t l = 0; l < o.layers; ++l) {
    after -= least[l];
    const Window& before = found.back();
    const int64_t room = capacity - after;
    const int64_t high = most[l] > room - before.high ? room : before.high + most[l];
    found.push_back({before.low + least[l], high, nullptr});
  }
  return found;
}

// out[i] = min(out[i], before[i] + cost).
inline void take_cheaper(int64_t count, const double* __restrict__ before, double cost, double* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) {
    const double sum = before[i] + cost;
    out[i] = sum < out[i] ? sum : out[i];
  }
}

void add_layer(const Options& o, int64_t layer, const Window& before, const Window& after) {
  for (int64_t low = after.low; low <= after.high; low += kTile) {
    const int64_t high = std::min(after.high, low + kTile - 1);
    std::fill(after.cost + (low - after.low), after.cost + (high - after.low + 1), kInfinity);
    for (int64_t i = o.offsets[layer]; i < o.offsets[layer + 1]; ++i) {
      const int64_t cell = o.cells[i];
      if (cell > high) continue;
      const int64_t first = std::max(low, before.low + cell), last = std::min(high, before.high + cell);
      if (first > last) continue;
      take_cheaper(last - first + 1, before.cost + (first - cell - before.low), o.costs[i],
                   after.cost + (first - after.low));
    }
  }
}

// The first option of the layer that leads to the cost of `sum`; moves `sum` to where it came from.
int64_t step_back(const Options& o, int64_t layer, const Window& before, const Window& after, int64_t* sum) {
  const double cost = after.cost[*sum - after.low];
  for (int64_t i = o.offsets[layer]; i < o.offsets[layer + 1]; ++i) {
    const int64_t from = *sum - o.cells[i];
    if (from < before.low || from > before.high) continue;
    if (before.cost[from - before.low] + o.costs[i] == cost) {
      *sum = from;
      return i - o.offsets[layer];
    }
  }
  return -1;
}

}  // namespace

extern "C" {

int ds_efficient_lgreco_planner_version() { return 1; }

// choices (layers) receives each layer's option of the cheapest plan whose cells sum to at most `capacity`, of equally
// cheap ones that of the least sum; -1 everywhere when there is none. Cells and costs are not negative.
int ds_efficient_lgreco_plan(int64_t layers, const int64_t* offsets, const int64_t* cells, const double* costs,
                             int64_t capacity, int64_t* choices, int threads) {
  (void)threads;  // a layer is a few tens of microseconds: not worth a thread
  if (layers < 0 || capacity < 0) return kUnknown;
  std::fill(choices, choices + layers, -1);
  if (layers == 0) return kDone;
  try {
    const Options options{layers, offsets, cells, costs};
    std::vector<Window> window = windows(options, capacity);
    if (window.empty()) return kDone;
    int64_t total = 0;
    for (const Window& w : window) total += w.high - w.low + 1;
    const std::unique_ptr<double[]> memory(new double[total]);
    double* free = memory.get();
    for (Window& w : window) {
      w.cost = free;
      free += w.high - w.low + 1;
    }
    window[0].cost[0] = 0.0;
    for (int64_t l = 0; l < layers; ++l) add_layer(options, l, window[l], window[l + 1]);
    const Window& end = window[layers];
    const double* best = std::min_element(end.cost, end.cost + (end.high - end.low + 1));
    if (*best == kInfinity) return kDone;
    int64_t sum = end.low + (best - end.cost);
    for (int64_t l = layers - 1; l >= 0; --l) choices[l] = step_back(options, l, window[l], window[l + 1], &sum);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kDone;
}

}  // extern "C"
