// Elements of gradients on the host; plain code, so that loops over them vectorise.
#pragma once

#include <cstdint>

#include "elements.h"
#include "number_types_cpu.h"

namespace ds_efficient {
namespace lgreco {

enum Status { kDone = 0, kUnknown = 1, kNoMemory = 2 };

// work.run<Element>() for the element type of a dtype.
template <typename Work>
int with_element(const Work& work, int dtype) {
  switch (dtype) {
    case kFloat32: return work.template run<Float32>();
    case kBfloat16: return work.template run<Bfloat16>();
    case kFloat16: return work.template run<Float16>();
    default: return kUnknown;
  }
}

}  // namespace lgreco
}  // namespace ds_efficient
