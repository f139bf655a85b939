// SPDX-License-Identifier: MIT
// The exceptions that leave the core.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include "dlnfast/types.hpp"

namespace dlnfast {

// Sizes that do not fit together.
struct ShapeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The caller's monitor asked for an end (Ctrl-C, or an exception of its own).
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// Names are views: these checks stand inside training steps, which allocate nothing.
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
