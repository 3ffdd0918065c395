// The row kernels of the log-prob head: what an instruction set has to offer. No torch headers and no inline functions,
// for files that are compiled for different instruction sets share this one.
#pragma once

#include <stdint.h>

#include "kinds.h"

namespace selm {

// z = softcap * tanh(scale * (x + bias) / softcap); softcap 0 stands for no cap, bias may be null.
struct Finish {
  const float* bias;
  float scale;
  float softcap;
};

// As fold of selm_fast/ops/rows_torch.py; rows of `width` tokens lie one after the other.
struct Fold {
  float* tile;
  const int64_t* targets;
  int64_t v0;
  int64_t width;
  float* peak;
  float* total;
  Finish finish;
  void* kept;  // null where nothing is kept
  Kind kept_kind;
  float* tops;  // given with a `kept` of 16 bits
};

// As softmax of selm_fast/ops/rows_torch.py.
struct Softmax {
  const void* tile;
  Kind tile_kind;
  const int64_t* targets;
  int64_t v0;
  int64_t width;
  const float* peak;
  const float* log_total;
  Finish finish;
  const float* tops;  // given with a finished tile of 16 bits
  bool finished;
  void* out;
  Kind out_kind;
};

struct RowKernels {
  // Rows [first, last). A row's bits do not depend on the range that it comes in.
  void (*fold)(const Fold&, int64_t first, int64_t last);
  void (*softmax)(const Softmax&, int64_t first, int64_t last);
};

}  // namespace selm
