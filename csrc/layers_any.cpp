// The kernels of decoder layers for whatever the compiler aims at by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include "layers.h"

#define SELM_LANES 4
#define SELM_LAYERS any_layers
#define SELM_NAME "any"
#include "layers_kernels.h"
