// SPDX-License-Identifier: MIT
// Version, instruction set and compiler of this build of the core.
#pragma once

#include <string>

#include "dlnfast/reflection.hpp"

namespace dlnfast {

struct BuildInfo {
  std::string version;
  std::string level;  // instruction set: baseline, v3 or v4
  std::string compiler;
  std::string eigen;
  bool openmp;
  int vector_bytes;
  int max_threads;  // threads.hpp, at present
  DLNFAST_FIELDS("BuildInfo", version, level, compiler, eigen, openmp, vector_bytes, max_threads)
};

BuildInfo build_info();

}  // namespace dlnfast
