// The kernels of decoder layers for processors with AVX2 and FMA.
#include "layers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define SELM_LANES 8
#define SELM_LAYERS avx2_layers
#define SELM_NAME "avx2"
#include "layers_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
