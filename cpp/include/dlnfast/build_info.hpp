// SPDX-License-Identifier: MIT
// How this copy of the core was built.
#pragma once

#include <string>

#include "dlnfast/fields.hpp"

namespace dlnfast {

struct BuildInfo {
  std::string version;
  std::string level;  // instruction set: baseline, v3, v4 or native
  std::string compiler;
  std::string eigen;
  bool openmp;
  int vector_bytes;
  int max_threads;  // threads.hpp, at present
  DLNFAST_FIELDS("BuildInfo", version, level, compiler, eigen, openmp, vector_bytes, max_threads)
};

BuildInfo build_info();

}  // namespace dlnfast
