// What the operators ask of tensors alike.
#pragma once

#include <ATen/core/Tensor.h>

#include "kinds.h"

namespace selm {

inline Kind kind_of(const at::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Kind::f32;
    case at::kBFloat16:
      return Kind::bf16;
    case at::kHalf:
      return Kind::f16;
    default:
      TORCH_CHECK_VALUE(false, name, " must be fp32, bf16 or fp16; got ", tensor.scalar_type());
  }
}

}  // namespace selm
