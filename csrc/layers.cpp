// The kernels of decoder layers as torch operators: checks, and the split of rows over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "tensors.h"
#include "variants.h"

namespace selm {
namespace {

void check(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.is_contiguous() && tensor.scalar_type() == dtype, name,
                    " must be contiguous, ", dtype, " and ", sizes, "; got ", tensor.scalar_type(), " ",
                    tensor.sizes());
}

// Numbers that are worth waking a thread for: some 10 us of work.
constexpr int64_t GRAIN = 32768;

// Rows whose products are summed in fp32 before they count in the gradient of a weight.
constexpr int64_t CHUNK_ROWS = 64;

void rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, double offset, bool rounds_first,
              at::Tensor& out, at::Tensor& inverse) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be (R, D); got ", x.sizes());
  const int64_t rows = x.size(0), width = x.size(1);
  const at::ScalarType dtype = x.scalar_type();
  Norm norm{};
  norm.kind = kind_of(x, "x");
  check(x, "x", {rows, width}, dtype);
  check(weight, "weight", {width}, dtype);
  check(out, "out", {rows, width}, dtype);
  check(inverse, "inverse", {rows}, at::kFloat);
  norm.x = x.const_data_ptr();
  norm.weight = weight.const_data_ptr();
  norm.width = width;
  norm.eps = static_cast<float>(eps);
  norm.offset = static_cast<float>(offset);
  norm.rounds_first = rounds_first;
  norm.out = out.mutable_data_ptr();
  norm.inverse = inverse.mutable_data_ptr<float>();
  const LayerKernels& kernels = variant().layers;
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)),
                   [&](int64_t first, int64_t last) { kernels.norm(norm, first, last); });
}

void rms_norm_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& inverse,
                       double offset, const std::optional<at::Tensor>& dx, const std::optional<at::Tensor>& d_weight) {
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be (R, D); got ", x.sizes());
  const int64_t rows = x.size(0), width = x.size(1), chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  const at::ScalarType dtype = x.scalar_type();
  NormBackward norm{};
  norm.kind = kind_of(x, "x");
  check(grad, "grad", {rows, width}, dtype);
  check(x, "x", {rows, width}, dtype);
  check(weight, "weight", {width}, dtype);
  check(inverse, "inverse", {rows}, at::kFloat);
  norm.grad = grad.const_data_ptr();
  norm.x = x.const_data_ptr();
  norm.weight = weight.const_data_ptr();
  norm.inverse = inverse.const_data_ptr<float>();
  norm.width = width;
  norm.offset = static_cast<float>(offset);
  if (dx.has_value()) {
    check(*dx, "dx", {rows, width}, dtype);
    norm.dx = dx->mutable_data_ptr();
  }
  c10::DataPtr memory;
  float* parts = nullptr;
  if (d_weight.has_value()) {
    check(*d_weight, "d_weight", {width}, at::kFloat);
    memory = c10::GetCPUAllocator()->allocate(chunks * width * sizeof(float));
    parts = static_cast<float*>(memory.mutable_get());
  }
  const LayerKernels& kernels = variant().layers;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, CHUNK_ROWS * width));
  at::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    NormBackward mine = norm;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      if (d_weight.has_value()) {
        mine.d_weight = parts + chunk * width;
        memset(mine.d_weight, 0, width * sizeof(float));
      }
      kernels.norm_backward(mine, chunk * CHUNK_ROWS, std::min(rows, (chunk + 1) * CHUNK_ROWS));
    }
  });
  if (!d_weight.has_value()) return;
  // Chunk after chunk for every column, and so in one order for any number of threads.
  float* const sums = d_weight->mutable_data_ptr<float>();
  at::parallel_for(0, width, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, chunks)),
                   [&](int64_t first, int64_t last) {
                     for (int64_t column = first; column < last; ++column) {
                       double sum = 0.0;
                       for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += parts[chunk * width + column];
                       sums[column] = static_cast<float>(sum);
                     }
                   });
}

Gate gate_of(const at::Tensor& gate, const at::Tensor& up, const std::string& activation, const at::Tensor& out) {
  Gate g{};
  g.kind = kind_of(gate, "gate");
  TORCH_CHECK_VALUE(activation == "silu" || activation == "gelu_tanh",
                    "activation must be silu or gelu_tanh; got ", activation);
  g.activation = activation == "silu" ? Activation::silu : Activation::gelu_tanh;
  check(gate, "gate", gate.sizes(), gate.scalar_type());
  check(up, "up", gate.sizes(), gate.scalar_type());
  check(out, "out", gate.sizes(), gate.scalar_type());
  g.gate = gate.const_data_ptr();
  g.up = up.const_data_ptr();
  g.out = out.mutable_data_ptr();
  return g;
}

void gated(const at::Tensor& gate, const at::Tensor& up, c10::string_view activation, at::Tensor& out) {
  const Gate g = gate_of(gate, up, std::string(activation), out);
  const LayerKernels& kernels = variant().layers;
  at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t first, int64_t last) { kernels.gate(g, first, last); });
}

void gated_backward(const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up, c10::string_view activation,
                    at::Tensor& d_gate, at::Tensor& d_up, at::Tensor& out) {
  GateBackward b{};
  b.gate = gate_of(gate, up, std::string(activation), out);
  check(grad, "grad", gate.sizes(), gate.scalar_type());
  check(d_gate, "d_gate", gate.sizes(), gate.scalar_type());
  check(d_up, "d_up", gate.sizes(), gate.scalar_type());
  b.grad = grad.const_data_ptr();
  b.d_gate = d_gate.mutable_data_ptr();
  b.d_up = d_up.mutable_data_ptr();
  const LayerKernels& kernels = variant().layers;
  at::parallel_for(0, gate.numel(), GRAIN, [&](int64_t first, int64_t last) { kernels.gate_backward(b, first, last); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selm_fast_cpp, m) {
  m.def(
      "rms_norm(Tensor x, Tensor weight, float eps, float offset, bool rounds_first, Tensor(a!) out, "
      "Tensor(b!) inverse) -> ()");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, float offset, Tensor(a!)? dx, "
      "Tensor(b!)? d_weight) -> ()");
  m.def("gated(Tensor gate, Tensor up, str activation, Tensor(a!) out) -> ()");
  m.def(
      "gated_backward(Tensor grad, Tensor gate, Tensor up, str activation, Tensor(a!) d_gate, Tensor(b!) d_up, "
      "Tensor(c!) out) -> ()");
}

TORCH_LIBRARY_IMPL(selm_fast_cpp, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("gated", gated);
  m.impl("gated_backward", gated_backward);
}

}  // namespace selm
