// SPDX-License-Identifier: MIT
// A probe that runs on any processor: which instruction-set levels does this one have?
#include <pybind11/pybind11.h>

namespace {

pybind11::list supported_levels() {
  pybind11::list levels;
  levels.append("baseline");
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
#if (defined(__clang__) && __clang_major__ >= 18) || (!defined(__clang__) && __GNUC__ >= 12)
  const bool v3 = __builtin_cpu_supports("x86-64-v3");
  const bool v4 = __builtin_cpu_supports("x86-64-v4");
#else  // older compilers know the features, not the levels
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
#endif
  if (v3) levels.append("v3");
  if (v4) levels.append("v4");
#endif
  return levels;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Instruction-set levels of this processor.";
  m.def("supported_levels", &supported_levels, "Levels that this processor runs, lowest first.");
}
