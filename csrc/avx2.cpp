// The kernels for processors with AVX2 and FMA.
#include "variants.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define SELM_LANES 8
#define SELM_VARIANT avx2_variant
#define SELM_NAME "avx2"
#include "variant_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
