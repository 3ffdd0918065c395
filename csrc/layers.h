// The elementwise parts of decoder layers: what an instruction set has to offer. No torch headers and no inline
// functions, for files that are compiled for different instruction sets share this one.
#pragma once

#include <stdint.h>

#include "kinds.h"

namespace selm {

// out = x * inverse * (offset + weight), inverse = 1 / sqrt(mean(x^2) + eps); rows of `width` numbers of one kind.
struct Norm {
  Kind kind;
  const void* x;
  const void* weight;
  int64_t width;
  float eps;
  float offset;
  bool rounds_first;  // x * inverse is rounded to `kind` before it is multiplied by the weight
  void* out;
  float* inverse;
};

// The gradients of `out` by x and by weight; either may be left out.
struct NormBackward {
  Kind kind;
  const void* grad;
  const void* x;
  const void* weight;
  const float* inverse;
  int64_t width;
  float offset;
  void* dx;         // null where nobody asks
  float* d_weight;  // (width), added to; null where nobody asks
};

enum class Activation { silu, gelu_tanh };

// out = act(gate) * up, where act(gate) is rounded to `kind` before it is multiplied.
struct Gate {
  Kind kind;
  Activation activation;
  const void* gate;
  const void* up;
  void* out;
};

// The gradients of `out` by gate and by up, and `out` once more.
struct GateBackward {
  Gate gate;
  const void* grad;
  void* d_gate;
  void* d_up;
};

struct LayerKernels {
  // Rows [first, last). A row's bits do not depend on the range that it comes in; those of d_weight do.
  void (*norm)(const Norm&, int64_t first, int64_t last);
  void (*norm_backward)(const NormBackward&, int64_t first, int64_t last);
  // Numbers [first, last), one by one.
  void (*gate)(const Gate&, int64_t first, int64_t last);
  void (*gate_backward)(const GateBackward&, int64_t first, int64_t last);
};

}  // namespace selm
