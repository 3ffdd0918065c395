// The row kernels as torch operators: checks, and the split of rows over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "tensors.h"
#include "variants.h"

namespace selm {
namespace {

void check_tile(const at::Tensor& tensor, const char* name, int64_t rows, int64_t width) {
  TORCH_CHECK_VALUE(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == width && tensor.is_contiguous(),
                    name, " must be contiguous and (", rows, ", ", width, "); got ", tensor.sizes());
}

void check_column(const at::Tensor& tensor, const char* name, int64_t size, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous() && tensor.scalar_type() == dtype, name,
      " must be contiguous, ", dtype, " and (", size, "); got ", tensor.scalar_type(), " ", tensor.sizes());
}

// Keeps the fp32 copy of the bias alive for as long as the kernels read it.
struct Finishing {
  at::Tensor bias;
  Finish finish;

  Finishing(const std::optional<at::Tensor>& given, double scale, std::optional<double> softcap, int64_t width)
      : finish{nullptr, static_cast<float>(scale), static_cast<float>(softcap.value_or(0.0))} {
    if (!given.has_value()) return;
    bias = given->to(at::kFloat).contiguous();
    check_column(bias, "bias", width, at::kFloat);
    finish.bias = bias.const_data_ptr<float>();
  }
};

// Enough rows for a thread to be worth waking: some 10 us of work.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

void fold_rows(at::Tensor& tile, const at::Tensor& targets, int64_t v0, at::Tensor& peak, at::Tensor& total,
               const std::optional<at::Tensor>& bias, double scale, std::optional<double> softcap,
               const std::optional<at::Tensor>& kept, const std::optional<at::Tensor>& tops) {
  TORCH_CHECK_VALUE(tile.dim() == 2 && tile.scalar_type() == at::kFloat, "tile must be (R, Vt) fp32; got ",
                    tile.scalar_type(), " ", tile.sizes());
  const int64_t rows = tile.size(0), width = tile.size(1);
  check_tile(tile, "tile", rows, width);
  check_column(targets, "targets", rows, at::kLong);
  check_column(peak, "peak", rows, at::kFloat);
  check_column(total, "total", rows, at::kFloat);
  const Finishing finishing(bias, scale, softcap, width);
  Fold fold{};
  fold.tile = tile.mutable_data_ptr<float>();
  fold.targets = targets.const_data_ptr<int64_t>();
  fold.v0 = v0;
  fold.width = width;
  fold.peak = peak.mutable_data_ptr<float>();
  fold.total = total.mutable_data_ptr<float>();
  fold.finish = finishing.finish;
  if (kept.has_value()) {
    check_tile(*kept, "kept", rows, width);
    fold.kept = kept->mutable_data_ptr();
    fold.kept_kind = kind_of(*kept, "kept");
    TORCH_CHECK_VALUE((fold.kept_kind != Kind::f32) == tops.has_value(),
                      "tops go with a `kept` of 16 bits, and only then");
  }
  if (tops.has_value()) {
    TORCH_CHECK_VALUE(kept.has_value(), "tops go with a `kept` of 16 bits, and only then");
    check_column(*tops, "tops", rows, at::kFloat);
    fold.tops = tops->mutable_data_ptr<float>();
  }
  const RowKernels& kernels = variant().rows;
  at::parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) { kernels.fold(fold, first, last); });
}

void softmax_rows(const at::Tensor& tile, const at::Tensor& targets, int64_t v0, const at::Tensor& peak,
                  const at::Tensor& log_total, at::Tensor& out,
                  const std::optional<at::Tensor>& bias, double scale, std::optional<double> softcap,
                  const std::optional<at::Tensor>& tops, bool finished) {
  TORCH_CHECK_VALUE(tile.dim() == 2, "tile must be (R, Vt); got ", tile.sizes());
  const int64_t rows = tile.size(0), width = tile.size(1);
  check_tile(tile, "tile", rows, width);
  check_tile(out, "out", rows, width);
  check_column(targets, "targets", rows, at::kLong);
  check_column(peak, "peak", rows, at::kFloat);
  check_column(log_total, "log_total", rows, at::kFloat);
  const Finishing finishing(bias, scale, softcap, width);
  Softmax softmax{};
  softmax.tile = tile.const_data_ptr();
  softmax.tile_kind = kind_of(tile, "tile");
  softmax.targets = targets.const_data_ptr<int64_t>();
  softmax.v0 = v0;
  softmax.width = width;
  softmax.peak = peak.const_data_ptr<float>();
  softmax.log_total = log_total.const_data_ptr<float>();
  softmax.finish = finishing.finish;
  softmax.finished = finished;
  softmax.out = out.mutable_data_ptr();
  softmax.out_kind = kind_of(out, "out");
  TORCH_CHECK_VALUE(tops.has_value() == (softmax.tile_kind != Kind::f32),
                    "tops go with a tile of 16 bits, and only then");
  TORCH_CHECK_VALUE(finished || softmax.tile_kind == Kind::f32, "an unfinished tile must be fp32; got ",
                    tile.scalar_type());
  if (tops.has_value()) {
    check_column(*tops, "tops", rows, at::kFloat);
    softmax.tops = tops->const_data_ptr<float>();
  }
  const RowKernels& kernels = variant().rows;
  at::parallel_for(0, rows, grain(width), [&](int64_t first, int64_t last) { kernels.softmax(softmax, first, last); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selm_fast_cpp, m) {
  m.def(
      "fold(Tensor(a!) tile, Tensor targets, int v0, Tensor(b!) peak, Tensor(c!) total, Tensor? bias, "
      "float scale, float? softcap, Tensor(d!)? kept, Tensor(e!)? tops) -> ()");
  m.def(
      "softmax(Tensor tile, Tensor targets, int v0, Tensor peak, Tensor log_total, Tensor(a!) out, Tensor? bias, "
      "float scale, float? softcap, Tensor? tops, bool finished) -> ()");
}

TORCH_LIBRARY_IMPL(selm_fast_cpp, CPU, m) {
  m.impl("fold", fold_rows);
  m.impl("softmax", softmax_rows);
}

}  // namespace selm
