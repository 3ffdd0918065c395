// The kernels of decoder layers for processors with AVX-512 (F, BW, DQ, VL: what Skylake servers and Zen 4 have).
#include "layers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif

#define SELM_LANES 16
#define SELM_LAYERS avx512_layers
#define SELM_NAME "avx512"
#include "layers_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
