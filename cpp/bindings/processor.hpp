// SPDX-License-Identifier: MIT
// The features of this processor that the instruction-set levels need. For code compiled at baseline:
// the module `_cpu`, and the program with which CMake finds the level of the machine that builds.
//
// They are read with the instructions cpuid and xgetbv, because __builtin_cpu_supports needs a
// library of the compiler that clang-cl does not link, and knows other names in each version.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dlnfast {

#if defined(__x86_64__)
namespace processor {

enum Register { eax, ebx, ecx, edx };
using Registers = std::array<unsigned, 4>;

// Returns the registers after cpuid; zeros for a leaf that the processor lacks.
inline Registers read_leaf(unsigned leaf) {
  Registers r{};
  if (__get_cpuid_count(leaf, 0, &r[eax], &r[ebx], &r[ecx], &r[edx]) == 0) r.fill(0);
  return r;
}

// Returns the register sets that the operating system saves; 0 if programs cannot ask.
inline unsigned read_saved_state() {
  constexpr unsigned has_xgetbv = 1u << 27;
  if ((read_leaf(1)[ecx] & has_xgetbv) == 0) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

struct Feature {
  const char* name;  // that of /proc/cpuinfo
  unsigned leaf;
  Register where;
  int bit;
};

// Levels as in the ABI of x86-64, without the level v2 in between.
inline constexpr Feature v3_features[] = {
    {"pni", 1, ecx, 0},          {"ssse3", 1, ecx, 9},
    {"fma", 1, ecx, 12},         {"cx16", 1, ecx, 13},
    {"sse4_1", 1, ecx, 19},      {"sse4_2", 1, ecx, 20},
    {"movbe", 1, ecx, 22},       {"popcnt", 1, ecx, 23},
    {"avx", 1, ecx, 28},         {"f16c", 1, ecx, 29},
    {"bmi1", 7, ebx, 3},         {"avx2", 7, ebx, 5},
    {"bmi2", 7, ebx, 8},         {"lahf_lm", 0x80000001, ecx, 0},
    {"abm", 0x80000001, ecx, 5},
};
inline constexpr Feature v4_features[] = {
    {"avx512f", 7, ebx, 16},  {"avx512dq", 7, ebx, 17}, {"avx512cd", 7, ebx, 28},
    {"avx512bw", 7, ebx, 30}, {"avx512vl", 7, ebx, 31},
};

template <std::size_t n>
void add_missing(const Feature (&features)[n], std::vector<std::string>& missing) {
  for (const Feature& feature : features) {
    if ((read_leaf(feature.leaf)[feature.where] >> feature.bit & 1u) == 0) {
      missing.push_back(feature.name);
    }
  }
}

}  // namespace processor
#endif

// Returns the features of a level ("baseline", "v3" or "v4") that this processor lacks, by their
// names in /proc/cpuinfo. The name of a level itself stands for levels of another architecture and
// for unknown levels, "ymm" and "zmm" for registers that the operating system does not save.
inline std::vector<std::string> missing_features(const std::string& level) {
  std::vector<std::string> missing;
  if (level == "baseline") return missing;
#if defined(__x86_64__)
  if (level == "v3" || level == "v4") {
    constexpr unsigned ymm = 0x6, zmm = 0xe6;
    const unsigned saved = processor::read_saved_state();
    processor::add_missing(processor::v3_features, missing);
    if ((saved & ymm) != ymm) missing.push_back("ymm");
    if (level == "v4") {
      processor::add_missing(processor::v4_features, missing);
#if !defined(__APPLE__)  // macOS reports them only after a first use, and saves them from then on
      if ((saved & zmm) != zmm) missing.push_back("zmm");
#endif
    }
    return missing;
  }
#endif
  missing.push_back(level);
  return missing;
}

// Returns the levels that this processor runs, lowest first.
inline std::vector<std::string> supported_levels() {
  std::vector<std::string> supported;
  for (const char* level : {"baseline", "v3", "v4"}) {
    if (missing_features(level).empty()) supported.push_back(level);
  }
  return supported;
}

}  // namespace dlnfast
