// SPDX-License-Identifier: MIT
// Exceptions thrown by the core.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "dlnfast/types.hpp"

namespace dlnfast {

// Incompatible sizes.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The caller's monitor requested an abort, for example after Ctrl-C.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Names are string views, because these checks run inside training steps, which must not allocate.
template <class T>
void require_shape(const MatrixRef<T>& m, Index rows, Index cols, std::string_view name) {
  if (m.rows != rows || m.cols != cols) {
    throw ShapeError(std::string(name) + " has shape (" + std::to_string(m.rows) + ", " +
                     std::to_string(m.cols) + "); wanted (" + std::to_string(rows) + ", " +
                     std::to_string(cols) + ")");
  }
}

inline void require_length(Index length, Index wanted, std::string_view name) {
  if (length != wanted) {
    throw ShapeError(std::string(name) + " has " + std::to_string(length) + " values; wanted " +
                     std::to_string(wanted));
  }
}

}  // namespace dlnfast
