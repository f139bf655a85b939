// SPDX-License-Identifier: MIT
// How this copy of the core was built.
#pragma once

#include <string>

namespace dlnfast {

struct BuildInfo {
  std::string version;
  std::string level;  // instruction set: baseline, v3, v4 or native
  std::string compiler;
  std::string eigen;
  bool openmp;
  int vector_bytes;
};

BuildInfo build_info();

}  // namespace dlnfast
