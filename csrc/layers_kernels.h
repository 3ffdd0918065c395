// The kernels of decoder layers, written once for all instruction sets; for variant_kernels.h. Everything here is local,
// as in vectors.h.
#include "vectors.h"

namespace selm {
namespace {

template <Kind kind>
SELM_INLINE Floats rounded(Floats x) {
  return Format<kind>::widen(Format<kind>::narrow(x));
}

template <Kind kind>
SELM_INLINE const void* from(const void* base, int64_t at) {
  return static_cast<const typename Format<kind>::Item*>(base) + at;
}

template <Kind kind>
SELM_INLINE void* from(void* base, int64_t at) {
  return static_cast<typename Format<kind>::Item*>(base) + at;
}

// Sums run in CHAINS vectors side by side: one alone would wait for each addition. What load puts beyond a row is 0.
constexpr int64_t CHAINS = 4;

SELM_INLINE float total(const Floats* sums) { return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])); }

template <Kind kind>
SELM_INLINE float squares_of(const void* x, int64_t width) {
  Floats sums[CHAINS] = {};
  int64_t at = 0;
  for (; at + CHAINS * LANES <= width; at += CHAINS * LANES) {
    for (int64_t i = 0; i < CHAINS; ++i) {
      const Floats value = load<kind>(x, at + i * LANES, LANES);
      sums[i] += value * value;
    }
  }
  for (; at < width; at += LANES) {
    const Floats value = load<kind>(x, at, width - at);
    sums[0] += value * value;
  }
  return total(sums);
}

template <Kind kind>
void norm_rows(const Norm& n, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const void* x = from<kind>(n.x, row * n.width);
    void* out = from<kind>(n.out, row * n.width);
    const float inverse = 1.0f / sqrtf(squares_of<kind>(x, n.width) / static_cast<float>(n.width) + n.eps);
    n.inverse[row] = inverse;
    for (int64_t at = 0; at < n.width; at += LANES) {
      const int64_t count = n.width - at;
      Floats value = load<kind>(x, at, count) * inverse;
      if (n.rounds_first) value = rounded<kind>(value);
      store<kind>(out, at, count, value * (load<kind>(n.weight, at, count) + n.offset));
    }
  }
}

// One vector of a row: adds grad * normalised to d_weight -> grad * weight * normalised.
template <Kind kind>
SELM_INLINE Floats norm_backward_at(const NormBackward& n, const void* grad, const void* x, float inverse, int64_t at,
                                    int64_t count) {
  const Floats g = load<kind>(grad, at, count);
  const Floats value = load<kind>(x, at, count) * inverse;
  if (n.d_weight != nullptr)
    store<Kind::f32>(n.d_weight, at, count, load<Kind::f32>(n.d_weight, at, count) + g * value);
  return g * (load<kind>(n.weight, at, count) + n.offset) * value;
}

// With the normalised row v and its gradient d: dx = (d - v * mean(d * v)) * inverse.
template <Kind kind>
void norm_backward_rows(const NormBackward& n, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const void* grad = from<kind>(n.grad, row * n.width);
    const void* x = from<kind>(n.x, row * n.width);
    const float inverse = n.inverse[row];
    Floats sums[CHAINS] = {};
    int64_t at = 0;
    for (; at + CHAINS * LANES <= n.width; at += CHAINS * LANES)
      for (int64_t i = 0; i < CHAINS; ++i)
        sums[i] += norm_backward_at<kind>(n, grad, x, inverse, at + i * LANES, LANES);
    for (; at < n.width; at += LANES) sums[0] += norm_backward_at<kind>(n, grad, x, inverse, at, n.width - at);
    if (n.dx == nullptr) continue;
    void* dx = from<kind>(n.dx, row * n.width);
    const float slope = total(sums) / static_cast<float>(n.width) * inverse;
    for (at = 0; at < n.width; at += LANES) {
      const int64_t count = n.width - at;
      const Floats d = load<kind>(grad, at, count) * (load<kind>(n.weight, at, count) + n.offset);
      store<kind>(dx, at, count, (d - load<kind>(x, at, count) * slope) * inverse);
    }
  }
}

// act(x) = x * share with share = sigmoid(bent): silu bends nothing, and 1 + tanh(z) = 2 * sigmoid(2 z).
constexpr float GELU = 1.59576912f;  // 2 * sqrt(2 / pi)
constexpr float CUBIC = 0.044715f;

struct Sigmoid {
  Floats share;
  Floats rest;  // 1 - share, to its last digit too
};

template <Activation activation>
SELM_INLINE Sigmoid sigmoid_of(Floats x) {
  const Floats bent = activation == Activation::silu ? x : x * (x * x * (GELU * CUBIC) + GELU);
  const Floats less = exp_of((Floats)((Words)bent | 0x80000000u));  // exp(-|bent|)
  const Floats larger_part = 1.0f / (less + 1.0f);
  const Floats smaller_part = less * larger_part;
  return {bent < Floats{} ? smaller_part : larger_part, bent < Floats{} ? larger_part : smaller_part};
}

// d act(x) / dx.
template <Activation activation>
SELM_INLINE Floats slope_of(Floats x, Sigmoid s) {
  const Floats bend = activation == Activation::silu ? x : x * (x * x * (3.0f * GELU * CUBIC) + GELU);
  return bend * (s.share * s.rest) + s.share;
}

template <Kind kind, Activation activation>
void gate_run(const Gate& g, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; at += LANES) {
    const int64_t count = last - at;
    const Floats x = load<kind>(g.gate, at, count);
    const Floats activated = rounded<kind>(x * sigmoid_of<activation>(x).share);
    store<kind>(g.out, at, count, activated * load<kind>(g.up, at, count));
  }
}

template <Kind kind, Activation activation>
void gate_backward_run(const GateBackward& b, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; at += LANES) {
    const int64_t count = last - at;
    const Floats x = load<kind>(b.gate.gate, at, count);
    const Floats up = load<kind>(b.gate.up, at, count);
    const Floats grad = load<kind>(b.grad, at, count);
    const Sigmoid sigmoid = sigmoid_of<activation>(x);
    const Floats activated = x * sigmoid.share;
    store<kind>(b.gate.out, at, count, rounded<kind>(activated) * up);
    store<kind>(b.d_gate, at, count, grad * up * slope_of<activation>(x, sigmoid));
    store<kind>(b.d_up, at, count, grad * activated);
  }
}

void norm(const Norm& n, int64_t first, int64_t last) {
  if (n.kind == Kind::f32)
    norm_rows<Kind::f32>(n, first, last);
  else if (n.kind == Kind::bf16)
    norm_rows<Kind::bf16>(n, first, last);
  else
    norm_rows<Kind::f16>(n, first, last);
}

void norm_backward(const NormBackward& n, int64_t first, int64_t last) {
  if (n.kind == Kind::f32)
    norm_backward_rows<Kind::f32>(n, first, last);
  else if (n.kind == Kind::bf16)
    norm_backward_rows<Kind::bf16>(n, first, last);
  else
    norm_backward_rows<Kind::f16>(n, first, last);
}

template <Activation activation>
void gate_with(const Gate& g, int64_t first, int64_t last) {
  if (g.kind == Kind::f32)
    gate_run<Kind::f32, activation>(g, first, last);
  else if (g.kind == Kind::bf16)
    gate_run<Kind::bf16, activation>(g, first, last);
  else
    gate_run<Kind::f16, activation>(g, first, last);
}

void gate(const Gate& g, int64_t first, int64_t last) {
  if (g.activation == Activation::silu)
    gate_with<Activation::silu>(g, first, last);
  else
    gate_with<Activation::gelu_tanh>(g, first, last);
}

template <Activation activation>
void gate_backward_with(const GateBackward& b, int64_t first, int64_t last) {
  if (b.gate.kind == Kind::f32)
    gate_backward_run<Kind::f32, activation>(b, first, last);
  else if (b.gate.kind == Kind::bf16)
    gate_backward_run<Kind::bf16, activation>(b, first, last);
  else
    gate_backward_run<Kind::f16, activation>(b, first, last);
}

void gate_backward(const GateBackward& b, int64_t first, int64_t last) {
  if (b.gate.activation == Activation::silu)
    gate_backward_with<Activation::silu>(b, first, last);
  else
    gate_backward_with<Activation::gelu_tanh>(b, first, last);
}

}  // namespace
}  // namespace selm
