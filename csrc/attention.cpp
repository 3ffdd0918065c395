// Attention over branches that share rows of keys, as torch operators: checks, the split over threads, and the sums of
// gradients over the keys that are copies of a row.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "variants.h"

namespace selm {
namespace {

// A thread is woken for some 50 us of work: numbers of the scores, times the head size.
constexpr int64_t GRAIN = 1 << 20;

at::Tensor checked(const at::Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == sizes && t.scalar_type() == dtype, name, " must be ", sizes, " ", dtype, "; got ",
                    t.sizes(), " ", t.scalar_type());
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

Source source(const at::Tensor& t) { return {static_cast<const char*>(t.const_data_ptr()), t.stride(0), t.stride(1)}; }

Target target(at::Tensor& t) { return {static_cast<char*>(t.mutable_data_ptr()), t.stride(0), t.stride(1)}; }

// The branches of a layout, which is read on the host and must fit.
struct Layout {
  at::Tensor kv_index, queries, keys;
  std::vector<Branch> branches;

  Layout(const at::Tensor& given_index, const at::Tensor& cu_q, const at::Tensor& cu_k, int64_t rows)
      : kv_index(indices(given_index, "kv_index")),
        queries(indices(cu_q, "cu_seqlens_q")),
        keys(indices(cu_k, "cu_seqlens_k")) {
    const int64_t size = queries.size(0), count = kv_index.size(0);
    TORCH_CHECK_VALUE(size > 0 && keys.size(0) == size, "cu_seqlens_q and cu_seqlens_k must both be (B+1,); got ",
                      queries.sizes(), " and ", keys.sizes());
    const int64_t *q = queries.const_data_ptr<int64_t>(), *k = keys.const_data_ptr<int64_t>();
    TORCH_CHECK_VALUE(q[0] == 0 && q[size - 1] == rows, "cu_seqlens_q must rise from 0 to ", rows, "; got ", q[0],
                      " to ", q[size - 1]);
    TORCH_CHECK_VALUE(k[0] == 0 && k[size - 1] == count, "cu_seqlens_k must rise from 0 to ", count, "; got ", k[0],
                      " to ", k[size - 1]);
    for (int64_t b = 0; b + 1 < size; ++b) {
      const Branch branch = {q[b], q[b + 1] - q[b], k[b], k[b + 1] - k[b]};
      TORCH_CHECK_VALUE(1 <= branch.queries && branch.queries <= branch.keys, "branch ", b, " has ", branch.queries,
                        " queries and ", branch.keys, " keys; expected at least one query and no fewer keys");
      branches.push_back(branch);
    }
    const int64_t* index = kv_index.const_data_ptr<int64_t>();
    uint64_t highest = 0;
    for (int64_t j = 0; j < count; ++j) highest = std::max(highest, static_cast<uint64_t>(index[j]));
    TORCH_CHECK_INDEX(count == 0 || highest < static_cast<uint64_t>(rows), "kv_index must name rows below ", rows);
  }

  static at::Tensor indices(const at::Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.dim() == 1 && (t.scalar_type() == at::kLong || t.scalar_type() == at::kInt), name,
                      " must be one row of integers; got ", t.scalar_type(), " ", t.sizes());
    return t.to(at::kLong).contiguous();
  }

  int64_t longest() const {
    int64_t keys = 0;
    for (const Branch& branch : branches) keys = std::max(keys, branch.keys);
    return keys;
  }
};

// What forward and backward are given alike: checked, and as the kernels read it.
struct Inputs {
  Layout layout;
  at::Tensor q, k, v;
  Attention attention{};

  Inputs(const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v, const at::Tensor& kv_index,
         const at::Tensor& cu_q, const at::Tensor& cu_k, double scale, int64_t window, double softcap)
      : layout(kv_index, cu_q, cu_k, rows_of(given_q, given_k)) {
    const int64_t rows = given_q.size(0), size = given_q.size(2), key_heads = given_k.size(1);
    const at::ScalarType dtype = given_q.scalar_type();
    q = checked(given_q, "q", given_q.sizes(), dtype);
    k = checked(given_k, "k", {rows, key_heads, size}, dtype);
    v = checked(given_v, "v", {rows, key_heads, size}, dtype);
    Attention& a = attention;
    a.kind = kind_of(q, "q");
    a.rows = rows;
    a.head_size = size;
    a.key_heads = key_heads;
    a.group = q.size(1) / key_heads;
    a.scale = static_cast<float>(scale);
    a.window = window < 0 ? INT64_MAX / 2 : window;
    a.softcap = static_cast<float>(softcap);
    a.kv_index = layout.kv_index.const_data_ptr<int64_t>();
    a.q = source(q);
    a.k = source(k);
    a.v = source(v);
  }

  static int64_t rows_of(const at::Tensor& q, const at::Tensor& k) {
    TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3 && k.size(1) > 0 && q.size(1) % k.size(1) == 0,
                      "q must be (T, H, Dh) and k, v (T, Hk, Dh) with H a multiple of Hk; got ", q.sizes(), " and ",
                      k.sizes());
    return q.size(0);
  }
};

// Every key head of every branch by itself, the longest first; a thread takes the next when it is done with one. What
// is computed does not depend on who does it.
template <typename Function>
void for_each_head(const Attention& a, const Layout& layout, const AttentionKernels& kernels, bool backward,
                   Function function) {
  std::vector<int64_t> order(layout.branches.size());
  std::iota(order.begin(), order.end(), 0);
  const auto cost = [&](int64_t b) { return layout.branches[b].queries * layout.branches[b].keys; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return cost(x) > cost(y); });
  int64_t work = 0;
  for (const int64_t b : order) work += cost(b) * a.key_heads * a.group * a.head_size;

  const int64_t tasks = static_cast<int64_t>(order.size()) * a.key_heads;
  const int64_t size = kernels.scratch(a, layout.longest(), backward);
  const int64_t threads = std::min({static_cast<int64_t>(at::get_num_threads()), tasks, 1 + work / GRAIN});
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const c10::DataPtr memory = c10::GetCPUAllocator()->allocate(size * sizeof(float));
    for (int64_t task = next++; task < tasks; task = next++)
      function(layout.branches[order[task / a.key_heads]], task % a.key_heads, static_cast<float*>(memory.get()));
  });
}

std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             const at::Tensor& kv_index, const at::Tensor& cu_q, const at::Tensor& cu_k,
                                             double scale, int64_t window, double softcap) {
  const Inputs in(q, k, v, kv_index, cu_q, cu_k, scale, window, softcap);
  const Attention& a = in.attention;
  at::Tensor out = at::empty(in.q.sizes(), in.q.options());
  at::Tensor lse = at::empty({in.q.size(1), a.rows}, in.q.options().dtype(at::kFloat));
  const AttentionOutput o = {target(out), lse.mutable_data_ptr<float>()};
  const AttentionKernels& kernels = variant().attention;
  for_each_head(a, in.layout, kernels, false, [&](const Branch& branch, int64_t key_head, float* scratch) {
    kernels.forward(a, o, branch, key_head, scratch);
  });
  return {out, lse};
}

// The keys of every row that is not read just once: they are numbered row by row, and in each in the order of kv_index.
struct Readers {
  std::vector<int64_t> places;  // (Tk) number of a key; -1 where its row is read just once
  std::vector<int64_t> rows;    // that are not read just once
  std::vector<int64_t> bounds;  // their keys are numbers [bounds[i], bounds[i + 1])

  Readers(const at::Tensor& kv_index, int64_t num_rows) : places(kv_index.size(0)), bounds(1) {
    const int64_t* index = kv_index.const_data_ptr<int64_t>();
    std::vector<int64_t> next(num_rows);
    for (size_t j = 0; j < places.size(); ++j) ++next[index[j]];
    for (int64_t row = 0; row < num_rows; ++row) {
      const int64_t readers = next[row];
      next[row] = readers == 1 ? -1 : bounds.back();
      if (readers == 1) continue;
      rows.push_back(row);
      bounds.push_back(bounds.back() + readers);
    }
    for (size_t j = 0; j < places.size(); ++j) places[j] = next[index[j]] < 0 ? -1 : next[index[j]]++;
  }
};

// The gradients of rows that several keys are copies of, or none: fp32 sums in the order of kv_index, rounded once.
template <typename Item>
void add_copies(const Attention& a, const AttentionGradients& g, const Readers& readers) {
  const int64_t size = a.head_size, stride = a.key_heads * 2 * size;
  at::parallel_for(0, readers.rows.size(), std::max<int64_t>(1, 65536 / stride), [&](int64_t first, int64_t last) {
    std::vector<float> sums(size);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t part = 0; part < 2 * a.key_heads; ++part) {
        const Target& to = part % 2 == 0 ? g.dk : g.dv;
        Item* out = reinterpret_cast<Item*>(to.data) + readers.rows[i] * to.row_stride + part / 2 * to.head_stride;
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t key = readers.bounds[i]; key < readers.bounds[i + 1]; ++key) {
          const float* copy = g.copies + key * stride + part * size;
          for (int64_t d = 0; d < size; ++d) sums[d] += copy[d];
        }
        for (int64_t d = 0; d < size; ++d) out[d] = static_cast<Item>(sums[d]);
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& given_grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& given_out, const at::Tensor& given_lse, const at::Tensor& kv_index, const at::Tensor& cu_q,
    const at::Tensor& cu_k, double scale, int64_t window, double softcap) {
  const Inputs in(q, k, v, kv_index, cu_q, cu_k, scale, window, softcap);
  const Attention& a = in.attention;
  const at::Tensor grad = checked(given_grad, "grad", in.q.sizes(), in.q.scalar_type());
  const at::Tensor out = checked(given_out, "out", in.q.sizes(), in.q.scalar_type());
  const at::Tensor lse = checked(given_lse, "lse", {in.q.size(1), a.rows}, at::kFloat).contiguous();
  const Readers readers(in.layout.kv_index, a.rows);
  at::Tensor dq = at::empty(in.q.sizes(), in.q.options()), dk = at::empty(in.k.sizes(), in.q.options()),
             dv = at::empty(in.v.sizes(), in.q.options());
  at::Tensor copies =
      at::empty({readers.bounds.back(), a.key_heads, 2, a.head_size}, in.q.options().dtype(at::kFloat));
  const AttentionGradients g = {source(grad), source(out), lse.const_data_ptr<float>(), target(dq), target(dk),
                                target(dv),   readers.places.data(), copies.mutable_data_ptr<float>()};
  const AttentionKernels& kernels = variant().attention;
  for_each_head(a, in.layout, kernels, true, [&](const Branch& branch, int64_t key_head, float* scratch) {
    kernels.backward(a, g, branch, key_head, scratch);
  });
  if (a.kind == Kind::f32)
    add_copies<float>(a, g, readers);
  else if (a.kind == Kind::bf16)
    add_copies<at::BFloat16>(a, g, readers);
  else
    add_copies<at::Half>(a, g, readers);
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(selm_fast_cpp, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor kv_index, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "float scale, int window, float softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor kv_index, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(selm_fast_cpp, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}

}  // namespace selm
