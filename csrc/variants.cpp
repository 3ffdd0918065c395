// The choice of the instruction set, as torch operators.
#include "variants.h"

#include <torch/library.h>

#include <atomic>
#include <string>
#include <vector>

namespace selm {
namespace {

// What this processor can run, best first.
std::vector<const Variant*> usable() {
  std::vector<const Variant*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    found.push_back(&avx512_variant);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_variant);
#endif
  found.push_back(&any_variant);
  return found;
}

std::atomic<const Variant*>& chosen() {
  static std::atomic<const Variant*> found{usable().front()};
  return found;
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Variant* one : usable()) names.emplace_back(one->name);
  return names;
}

void set_variant(const std::string& name) {
  for (const Variant* one : usable()) {
    if (name == one->name) {
      chosen() = one;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "variant must be one of ", variants(), "; got ", name);
}

}  // namespace

const Variant& variant() { return *chosen().load(); }

TORCH_LIBRARY(selm_fast_cpp, m) {
  m.def("variants() -> str[]", variants);
  m.def("set_variant(str name) -> ()", set_variant);
}

}  // namespace selm
