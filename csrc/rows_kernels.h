// The row kernels, written once for all instruction sets; for variant_kernels.h. Everything here is local, as in
// vectors.h.
#include "vectors.h"

namespace selm {
namespace {

SELM_INLINE Floats finished(const Finish& f, Floats x, int64_t at, int64_t count) {
  if (f.bias != nullptr) x += load<Kind::f32>(f.bias, at, count);
  if (f.scale != 1.0f) x *= f.scale;
  if (f.softcap != 0.0f) x = tanh_of(x / f.softcap) * f.softcap;
  return x;
}

// z of a row, written to `z` where asked -> the largest of them.
SELM_INLINE float finish_run(const Finish& f, const float* x, float* z, bool write, int64_t width) {
  Floats top = splat(-INFINITY);
  for (int64_t at = 0; at < width; at += LANES) {
    const int64_t count = width - at;
    const Floats value = finished(f, load<Kind::f32>(x, at, count), at, count);
    if (write) store<Kind::f32>(z, at, count, value);
    top = larger(only(value, count, -INFINITY), top);
  }
  return largest(top);
}

// The sum of exp(z - shift) over the columns [first, last) of a row.
SELM_INLINE float exp_run(const float* z, float shift, int64_t first, int64_t last) {
  Floats sums[4] = {};
  int64_t at = first;
  for (; at + 4 * LANES <= last; at += 4 * LANES)
    for (int64_t i = 0; i < 4; ++i) sums[i] += exp_of(load<Kind::f32>(z, at + i * LANES, LANES) - shift);
  for (; at < last; at += LANES)
    sums[0] += only(exp_of(load<Kind::f32>(z, at, last - at) - shift), last - at, 0.0f);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <Kind kind>
SELM_INLINE void keep_run(const float* z, float shift, void* kept, int64_t width) {
  for (int64_t at = 0; at < width; at += LANES)
    store<kind>(kept, at, width - at, load<Kind::f32>(z, at, width - at) - shift);
}

// exp(top - higher), and 1 where both are -inf.
SELM_INLINE double weight_under(double top, double higher) { return top == higher ? 1.0 : exp(top - higher); }

void fold(const Fold& f, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = f.tile + row * f.width;
    float* z = f.tile + row * f.width;
    bool write = f.finish.bias != nullptr || f.finish.scale != 1.0f || f.finish.softcap != 0.0f;
    if (f.kept != nullptr && f.kept_kind == Kind::f32) {
      z = static_cast<float*>(f.kept) + row * f.width;
      write = write || z != x;
    }
    const float top = finish_run(f.finish, x, z, write, f.width);
    const float shift = top == -INFINITY ? 0.0f : top;  // a bias of -inf may rule a whole tile out
    if (f.tops != nullptr) {
      uint16_t* kept = static_cast<uint16_t*>(f.kept) + row * f.width;
      if (f.kept_kind == Kind::bf16)
        keep_run<Kind::bf16>(z, shift, kept, f.width);
      else
        keep_run<Kind::f16>(z, shift, kept, f.width);
      f.tops[row] = shift;
    }

    // The target cuts the row in two, so that its term never enters the sum.
    const int64_t column = f.targets[row] - f.v0;
    const bool inside = column >= 0 && column < f.width;
    float sum = exp_run(z, shift, 0, inside ? column : f.width);
    if (inside) {
      sum += exp_run(z, shift, column + 1, f.width);
      if (z[column] != z[column]) sum = z[column];  // but that a NaN shows
    }
    const float higher = top > f.peak[row] ? top : f.peak[row];
    const double total = f.total[row] * weight_under(f.peak[row], higher) + sum * weight_under(top, higher);
    f.total[row] = static_cast<float>(total);
    f.peak[row] = higher;
  }
}

template <Kind from, Kind to>
void softmax_rows(const Softmax& s, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const auto* tile = static_cast<const typename Format<from>::Item*>(s.tile) + row * s.width;
    auto* out = static_cast<typename Format<to>::Item*>(s.out) + row * s.width;
    const float top = s.tops == nullptr ? 0.0f : s.tops[row];
    const float above = top - s.peak[row];
    const float log_total = s.log_total[row];
    for (int64_t at = 0; at < s.width; at += LANES) {
      const int64_t count = s.width - at;
      Floats z = load<from>(tile, at, count);
      if (!s.finished) z = finished(s.finish, z, at, count);
      Floats share = exp_of(z + above - log_total);
      if (s.finish.softcap != 0.0f) {
        const Floats t = (z + top) / s.finish.softcap;
        share *= 1.0f - t * t;
      }
      if (s.finish.scale != 1.0f) share *= s.finish.scale;
      store<to>(out, at, count, share);
    }
    const int64_t column = s.targets[row] - s.v0;
    if (column >= 0 && column < s.width) out[column] = 0;
  }
}

template <Kind from>
void softmax_from(const Softmax& s, int64_t first, int64_t last) {
  if (s.out_kind == Kind::f32)
    softmax_rows<from, Kind::f32>(s, first, last);
  else if (s.out_kind == Kind::bf16)
    softmax_rows<from, Kind::bf16>(s, first, last);
  else
    softmax_rows<from, Kind::f16>(s, first, last);
}

void softmax(const Softmax& s, int64_t first, int64_t last) {
  if (s.tile_kind == Kind::f32)
    softmax_from<Kind::f32>(s, first, last);
  else if (s.tile_kind == Kind::bf16)
    softmax_from<Kind::bf16>(s, first, last);
  else
    softmax_from<Kind::f16>(s, first, last);
}

}  // namespace
}  // namespace selm
