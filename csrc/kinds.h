// The formats that numbers have in memory. No torch headers, for files that are compiled for different instruction sets
// share this one.
#pragma once

#include <stdint.h>

namespace selm {

enum class Kind { f32, bf16, f16 };

}  // namespace selm
