// What the kernels share: vectors of SELM_LANES numbers (vector types of GCC and Clang), exp and tanh, and the
// formats that numbers have in memory. Included after the instruction set has been chosen and Kind is known.
// Everything here is local to the file that includes it: an inline function of a standard header, compiled here for
// AVX-512, might be the copy that the linker keeps for all.
#pragma once

#include <math.h>
#include <string.h>

#define SELM_INLINE static inline __attribute__((always_inline))

namespace selm {
namespace {

constexpr int64_t LANES = SELM_LANES;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

SELM_INLINE Floats splat(float x) { return x - Floats{}; }

// exp with an error below 1 ulp; 0 below the least normal number, inf from 88.4 on, NaN for NaN.
SELM_INLINE Floats exp_of(Floats x) {
  const Floats capped = x > splat(89.0f) ? splat(89.0f) : x;
  // The sum with 1.5 * 2^23 has the nearest integer in its low bits.
  const Floats shifted = capped * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  Floats r = n * -0.693359375f + capped;  // ln 2 in two parts, the first of which n multiplies exactly
  r = n * 2.12194440e-4f + r;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // coefficients: Cephes, expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r;
  p = p + 1.0f;
  const Floats power = (Floats)(((Words)shifted + 127u) << 23);
  return x < splat(-87.3365447f) ? Floats{} : p * power;
}

// tanh with an error below 2 ulp.
SELM_INLINE Floats tanh_of(Floats x) {
  const Words sign = (Words)x & 0x80000000u;
  const Floats a = (Floats)((Words)x ^ sign);
  const Floats s = x * x;
  Floats p = s * -5.70498872745e-3f + 2.06390887954e-2f;  // coefficients: Cephes, tanhf
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const Floats small = p * s * x + x;
  const Floats large = 1.0f - 2.0f / (exp_of(a + a) + 1.0f);
  return a < splat(0.625f) ? small : (Floats)((Words)large | sign);
}

SELM_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

SELM_INLINE float largest(Floats x) {
  float top = x[0];
  for (int64_t i = 1; i < LANES; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// The sum of all lanes, in one order everywhere.
SELM_INLINE float sum_of(Floats x) {
  float parts[LANES];
  memcpy(parts, &x, sizeof x);
  for (int64_t width = LANES / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

template <Kind kind>
struct Format;

template <>
struct Format<Kind::f32> {
  typedef float Item;
  typedef Floats Pack;
  SELM_INLINE Floats widen(Floats x) { return x; }
  SELM_INLINE Floats narrow(Floats x) { return x; }
};

template <>
struct Format<Kind::bf16> {
  typedef uint16_t Item;
  typedef Halves Pack;
  SELM_INLINE Floats widen(Halves x) { return (Floats)(__builtin_convertvector(x, Words) << 16); }
  SELM_INLINE Halves narrow(Floats x) {
    const Words u = (Words)x;
    const Words nearest = u + 0x7fffu + ((u >> 16) & 1u);
    return __builtin_convertvector((x != x ? u | 0x400000u : nearest) >> 16, Halves);
  }
};

// Conversions after Fabian Giesen, "float->half variants" (public domain).
template <>
struct Format<Kind::f16> {
  typedef uint16_t Item;
  typedef Halves Pack;
  SELM_INLINE Floats widen(Halves x) {
    const Words h = __builtin_convertvector(x, Words);
    const Words o = (h & 0x7fffu) << 13;
    const Ints exponent = (Ints)(o & 0x0f800000u);
    const Words normal = o + (112u << 23);
    const Words special = o + (224u << 23);
    const Words tiny = (Words)((Floats)(o + (113u << 23)) - (Floats)(Words{} + (113u << 23)));
    const Words magnitude = exponent == 0x0f800000 ? special : exponent == 0 ? tiny : normal;
    return (Floats)(magnitude | (h & 0x8000u) << 16);
  }
  SELM_INLINE Halves narrow(Floats x) {
    const Words sign = (Words)x & 0x80000000u;
    const Words u = (Words)x ^ sign;
    const Words special = (Ints)u > 0x7f800000 ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    const Words magic = Words{} + (126u << 23);
    const Words tiny = (Words)((Floats)u + (Floats)magic) - magic;
    const Words normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
    const Words magnitude = (Ints)u >= (143 << 23) ? special : (Ints)u < (113 << 23) ? tiny : normal;
    return __builtin_convertvector(magnitude | sign >> 16, Halves);
  }
};

// `count` numbers from memory, fewer than LANES only at the end of a run; the rest of the vector is 0.
template <Kind kind>
SELM_INLINE Floats load(const void* base, int64_t at, int64_t count) {
  typedef Format<kind> F;
  const auto* from = static_cast<const typename F::Item*>(base) + at;
  typename F::Pack pack{};
  if (count >= LANES)
    memcpy(&pack, from, sizeof pack);
  else
    memcpy(&pack, from, count * sizeof(typename F::Item));
  return F::widen(pack);
}

template <Kind kind>
SELM_INLINE void store(void* base, int64_t at, int64_t count, Floats x) {
  typedef Format<kind> F;
  auto* to = static_cast<typename F::Item*>(base) + at;
  const typename F::Pack pack = F::narrow(x);
  if (count >= LANES)
    memcpy(to, &pack, sizeof pack);
  else
    memcpy(to, &pack, count * sizeof(typename F::Item));
}

// Lanes from `count` on get the value `other`.
SELM_INLINE Floats only(Floats x, int64_t count, float other) {
  if (count >= LANES) return x;
  float parts[LANES];
  memcpy(parts, &x, sizeof x);
  for (int64_t i = count; i < LANES; ++i) parts[i] = other;
  memcpy(&x, parts, sizeof x);
  return x;
}

}  // namespace
}  // namespace selm
