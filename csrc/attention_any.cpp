// Attention for whatever the compiler aims at by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include "attention.h"

#define SELM_LANES 4
#define SELM_ATTENTION any_attention
#define SELM_NAME "any"
#include "attention_kernels.h"
