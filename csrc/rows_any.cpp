// The row kernels for whatever the compiler aims at by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include "rows.h"

#define SELM_LANES 4
#define SELM_KERNELS any_kernels
#define SELM_NAME "any"
#include "rows_kernels.h"
