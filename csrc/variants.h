// Which instruction set's kernels run: chosen in rows.cpp, one choice for all kernels.
#pragma once

namespace selm {

// "avx512", "avx2" or "any".
const char* variant();

}  // namespace selm
