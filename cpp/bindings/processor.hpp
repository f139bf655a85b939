// SPDX-License-Identifier: MIT
// The features of this processor that the instruction-set levels need. For code compiled at baseline:
// the module `_cpu`, and the program with which CMake finds the level of the machine that builds.
#pragma once

#include <string>
#include <vector>

namespace dlnfast {

// Returns the features of a level ("baseline", "v3" or "v4") that this processor lacks, by their
// names in /proc/cpuinfo. The name of a level itself stands for features for which older compilers
// have no name, for levels of another architecture and for unknown levels.
inline std::vector<std::string> missing_features(const std::string& level) {
  std::vector<std::string> missing;
  if (level == "baseline") return missing;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto require = [&](const char* name, bool is_present) {
    if (!is_present) missing.push_back(name);
  };
#define DLNFAST_REQUIRE(name) require(name, __builtin_cpu_supports(name) != 0)
  DLNFAST_REQUIRE("popcnt");
  DLNFAST_REQUIRE("avx");
  DLNFAST_REQUIRE("avx2");
  DLNFAST_REQUIRE("fma");
  DLNFAST_REQUIRE("bmi");
  DLNFAST_REQUIRE("bmi2");
  if (level == "v4") {
    DLNFAST_REQUIRE("avx512f");
    DLNFAST_REQUIRE("avx512bw");
    DLNFAST_REQUIRE("avx512cd");
    DLNFAST_REQUIRE("avx512dq");
    DLNFAST_REQUIRE("avx512vl");
  }
#if (defined(__clang__) && __clang_major__ >= 18) || (!defined(__clang__) && __GNUC__ >= 12)
  if (missing.empty()) DLNFAST_REQUIRE("x86-64-v3");
  if (missing.empty() && level == "v4") DLNFAST_REQUIRE("x86-64-v4");
#endif
#undef DLNFAST_REQUIRE
  if (level != "v3" && level != "v4") missing.push_back(level);
#else
  missing.push_back(level);
#endif
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
