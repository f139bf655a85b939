# SPDX-License-Identifier: MIT
# Eigen >= 3.4 as Eigen3::Eigen. No version is asked for in find_package, because Eigen 5 refuses a
# request for 3.4; the suffix is where the PyPI package cmeel-eigen keeps its CMake files.
find_package(Eigen3 CONFIG QUIET PATH_SUFFIXES cmeel.prefix/share/eigen3/cmake)
if(NOT Eigen3_FOUND)
  message(FATAL_ERROR "Eigen >= 3.4 not found: use 'pip install .', or apt install libeigen3-dev, or -DEigen3_ROOT=")
elseif(Eigen3_VERSION VERSION_LESS 3.4 OR Eigen3_VERSION VERSION_GREATER_EQUAL 6)
  message(FATAL_ERROR "Eigen ${Eigen3_VERSION} is outside [3.4, 6)")
endif()
