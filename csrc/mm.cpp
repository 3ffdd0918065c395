// Matmuls of 16-bit operands with fp32 results, which torch.mm has on CUDA only: oneDNN's small matmul, brgemm, walked
// over blocks of the result.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>
#if __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif

#include <string.h>

#include <algorithm>
#include <exception>

#include "pack.h"

namespace selm {
namespace {

constexpr int64_t PART_BYTES = 4 << 20;

// out (BLOCK, BLOCK) = or += a (BLOCK, depth) times packed b (depth, BLOCK). Blocks are always whole: torch keeps every
// kernel that it generates, and so the bits of a row depend neither on the other rows nor on the number of threads.
void multiply(at::ScalarType dtype, int64_t depth, const uint16_t* a, int64_t a_stride, const uint32_t* b, float* out,
              int64_t out_stride, bool add) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  if (dtype == at::kBFloat16)
    return at::native::cpublas::brgemm(BLOCK, BLOCK, depth, a_stride, BLOCK, out_stride, add,
                                       reinterpret_cast<const at::BFloat16*>(a),
                                       reinterpret_cast<const at::BFloat16*>(b), out);
#endif
#if defined(CPUBLAS_BRGEMM_F16F16F32)
  if (dtype == at::kHalf)
    return at::native::cpublas::brgemm(BLOCK, BLOCK, depth, a_stride, BLOCK, out_stride, add,
                                       reinterpret_cast<const at::Half*>(a), reinterpret_cast<const at::Half*>(b), out);
#endif
  TORCH_CHECK(false, "this torch has no brgemm for ", dtype);
}

// Gives the processor's matrix unit back, where it has one: once in each thread, after the last block.
void release() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release();
#endif
}

// Are a block's numbers right here? brgemm raises where the processor or the build of torch lacks it.
bool probe(at::ScalarType dtype) {
  // Small integers, exact in either format: a is 1 but for a 2 in each row, b for a 2 in each column.
  const uint16_t one = dtype == at::kHalf ? 0x3c00 : 0x3f80, two = 0x4000;
  const auto a_at = [](int64_t m, int64_t k) { return k == m % UNIT; };
  const auto b_at = [](int64_t k, int64_t n) { return k == n / 2; };
  uint16_t a[BLOCK * UNIT], b[UNIT * BLOCK];
  for (int64_t m = 0; m < BLOCK; ++m)
    for (int64_t k = 0; k < UNIT; ++k) a[m * UNIT + k] = a_at(m, k) ? two : one;
  for (int64_t k = 0; k < UNIT; ++k)
    for (int64_t n = 0; n < BLOCK; ++n) b[k * BLOCK + n] = b_at(k, n) ? two : one;
  uint32_t packed[UNIT / 2 * BLOCK];
  pack_right({b, UNIT, BLOCK, BLOCK, 1}, 0, packed);
  float out[BLOCK * BLOCK];
  try {
    multiply(dtype, UNIT, a, UNIT, packed, out, BLOCK, false);
    release();
  } catch (const std::exception&) {
    return false;
  }
  for (int64_t m = 0; m < BLOCK; ++m)
    for (int64_t n = 0; n < BLOCK; ++n)
      if (out[m * BLOCK + n] != static_cast<float>(UNIT + 2 + (m % UNIT == n / 2))) return false;
  return true;
}

bool mm_serves(at::ScalarType dtype) {
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool bf16 = probe(at::kBFloat16);
  static const bool f16 = probe(at::kHalf);
  return dtype == at::kBFloat16 ? bf16 : dtype == at::kHalf && f16;
}

Matrix matrix(const at::Tensor& t) {
  // A dimension of size 1 may have any stride; 1 makes it one of the two layouts.
  return {static_cast<const uint16_t*>(t.const_data_ptr()), t.size(0), t.size(1), t.size(0) == 1 ? 1 : t.stride(0),
          t.size(1) == 1 ? 1 : t.stride(1)};
}

at::Tensor with_a_unit_stride(const at::Tensor& t) {
  const Matrix m = matrix(t);
  return m.row_stride == 1 || m.column_stride == 1 ? t : t.contiguous();
}

void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row)
    memcpy(to + row * to_stride, from + row * from_stride, columns * sizeof(float));
}

template <typename Item>
struct Buffer {
  explicit Buffer(int64_t items) : memory(c10::GetCPUAllocator()->allocate(items * sizeof(Item))) {}
  Item* at(int64_t item) { return static_cast<Item*>(memory.mutable_get()) + item; }
  c10::DataPtr memory;
};

void mm(at::Tensor& out, const at::Tensor& a_given, const at::Tensor& b_given, bool accumulate) {
  const at::ScalarType dtype = a_given.scalar_type();
  TORCH_CHECK_VALUE(a_given.dim() == 2 && b_given.dim() == 2 && a_given.size(1) == b_given.size(0) &&
                        b_given.scalar_type() == dtype && b_given.is_cpu(),
                    "a must be (M, K), b (K, N), of one dtype; got ", dtype, " ", a_given.sizes(), " and ",
                    b_given.scalar_type(), " ", b_given.sizes());
  const int64_t M = a_given.size(0), N = b_given.size(1), K = a_given.size(1);
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == M && out.size(1) == N && out.scalar_type() == at::kFloat &&
                        (out.stride(1) == 1 || N == 1),
                    "out must be fp32 and (", M, ", ", N, ") with contiguous rows; got ", out.scalar_type(), " ",
                    out.sizes(), " with strides ", out.strides());
  TORCH_CHECK_VALUE(mm_serves(dtype), "this processor, or this torch, has no matmul of ", dtype, " with fp32 results");
  if (M == 0 || N == 0) return;
  if (K == 0) {
    if (!accumulate) out.zero_();
    return;
  }
  const at::Tensor a_tensor = with_a_unit_stride(a_given), b_tensor = with_a_unit_stride(b_given);
  const Matrix a = matrix(a_tensor), b = matrix(b_tensor);
  const int64_t depth = round_up(K, UNIT), a_blocks = (M + BLOCK - 1) / BLOCK, b_blocks = (N + BLOCK - 1) / BLOCK;
  float* const results = out.mutable_data_ptr<float>();
  const int64_t out_stride = out.stride(0);

  // The whole blocks of a row-major `a` can stay where they are.
  const int64_t in_place = a.column_stride == 1 && depth == K ? M / BLOCK : 0;
  Buffer<uint16_t> left((a_blocks - in_place) * BLOCK * depth);
  at::parallel_for(in_place, a_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) pack_left(a, m * BLOCK, left.at((m - in_place) * BLOCK * depth));
  });

  // b is packed in parts that the caches hold.
  const int64_t part = std::min(b_blocks, std::max<int64_t>(1, PART_BYTES / (BLOCK * depth * 2)));
  Buffer<uint32_t> right(part * BLOCK * depth / 2);
  for (int64_t n0 = 0; n0 < b_blocks; n0 += part) {
    const int64_t n1 = std::min(b_blocks, n0 + part);
    at::parallel_for(n0, n1, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) pack_right(b, n * BLOCK, right.at((n - n0) * BLOCK * depth / 2));
    });
    at::parallel_for(0, a_blocks * (n1 - n0), 1, [&](int64_t first, int64_t last) {
      float scratch[BLOCK * BLOCK] = {};  // takes the place of results that are not a whole block
      for (int64_t i = first; i < last; ++i) {
        const int64_t m = i % a_blocks, n = i / a_blocks;
        const bool packed = m >= in_place;
        const int64_t height = std::min(BLOCK, M - m * BLOCK), width = std::min(BLOCK, N - (n0 + n) * BLOCK);
        const bool whole = height == BLOCK && width == BLOCK;
        float* const result = results + m * BLOCK * out_stride + (n0 + n) * BLOCK;
        if (!whole && accumulate) copy_rows(result, out_stride, scratch, BLOCK, height, width);
        for (int64_t k = 0; k < depth; k += CHUNK) {
          const int64_t size = std::min(CHUNK, depth - k);
          multiply(dtype, size,
                   packed ? left.at((m - in_place) * BLOCK * depth + BLOCK * k) : a.data + m * BLOCK * a.row_stride + k,
                   packed ? size : a.row_stride, right.at((n * depth + k) * BLOCK / 2), whole ? result : scratch,
                   whole ? out_stride : BLOCK, accumulate || k > 0);
        }
        if (!whole) copy_rows(scratch, BLOCK, result, out_stride, height, width);
      }
      release();
    });
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selm_fast_cpp, m) {
  m.def("mm_serves(ScalarType dtype) -> bool", mm_serves);
  m.def("mm_(Tensor(a!) out, Tensor a, Tensor b, bool accumulate) -> ()");
}

TORCH_LIBRARY_IMPL(selm_fast_cpp, CPU, m) { m.impl("mm_", mm); }

}  // namespace selm
