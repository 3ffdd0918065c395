// All kernels of an instruction set; any.cpp, avx2.cpp and avx512.cpp include this file with SELM_LANES, SELM_VARIANT and
// SELM_NAME, after the instruction set has been chosen.
#include "attention_kernels.h"
#include "layers_kernels.h"
#include "rows_kernels.h"

namespace selm {

extern const Variant SELM_VARIANT = {
    SELM_NAME,
    {fold, softmax},
    {norm, norm_backward, gate, gate_backward},
    {scratch_size, forward, backward},
};

}  // namespace selm
