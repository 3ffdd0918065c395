// The kernels of one instruction set, and which set's run: one choice for all. No torch headers and no inline functions,
// for files that are compiled for different instruction sets share this one.
#pragma once

#include "attention.h"
#include "layers.h"
#include "rows.h"

namespace selm {

struct Variant {
  const char* name;
  RowKernels rows;
  LayerKernels layers;
  AttentionKernels attention;
};

extern const Variant any_variant;
#if defined(__x86_64__)
extern const Variant avx2_variant;
extern const Variant avx512_variant;
#endif

// The one that is chosen: the best that this processor can run, or what set_variant asked for.
const Variant& variant();

}  // namespace selm
