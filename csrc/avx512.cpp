// The kernels for processors with AVX-512 (F, BW, DQ, VL: what Skylake servers and Zen 4 have).
#include "variants.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define SELM_LANES 16
#define SELM_VARIANT avx512_variant
#define SELM_NAME "avx512"
#include "variant_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
