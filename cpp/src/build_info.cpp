// SPDX-License-Identifier: MIT
#include "dlnfast/build_info.hpp"

#include <Eigen/Core>

#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"

namespace dlnfast {

BuildInfo build_info() {
  BuildInfo info;
  info.version = DLNFAST_VERSION;
  info.level = DLNFAST_LEVEL;
#if defined(__clang__)
  info.compiler = std::string("Clang ") + __clang_version__;
#else
  info.compiler = std::string("GCC ") + __VERSION__;
#endif
  info.eigen = std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) +
               "." + std::to_string(EIGEN_MINOR_VERSION);
  info.openmp = has_openmp();
  info.vector_bytes = simd::vector_bytes;
  info.max_threads = max_threads();
  return info;
}

}  // namespace dlnfast
