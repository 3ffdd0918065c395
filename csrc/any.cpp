// The kernels for whatever the compiler aims at by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include "variants.h"

#define SELM_LANES 4
#define SELM_VARIANT any_variant
#define SELM_NAME "any"
#include "variant_kernels.h"
