// SPDX-License-Identifier: MIT
// Read-only views of matrices.
#pragma once

#include "dlnfast/types.hpp"

namespace dlnfast {

template <class T>
MatrixRef<const T> view(const Matrix<T>& m) {
  return {m.data(), m.rows(), m.cols()};
}

// Returns a view of the first k rows.
template <class T>
MatrixRef<const T> top(const Matrix<T>& m, Index k) {
  return {m.data(), k, m.cols()};
}

}  // namespace dlnfast
