// SPDX-License-Identifier: MIT
// Exception-safe resizing. Eigen 3.4 frees the old memory first and clears its pointer only after
// the new allocation: if that allocation fails, the destructor frees the memory a second time.
#pragma once

#include "dlnfast/types.hpp"

namespace dlnfast {

// Resizes a matrix. If the allocation fails, the matrix has no entries.
template <class T>
void safe_resize(Matrix<T>& m, Index rows, Index cols) {
  if (m.rows() == rows && m.cols() == cols) return;
  m.resize(0, 0);
  m.resize(rows, cols);
}

// m = x; x must not refer to m.
template <class T, class Expression>
void safe_assign(Matrix<T>& m, const Expression& x) {
  safe_resize(m, x.rows(), x.cols());
  m = x;
}

// a = x and b = y. If an allocation fails, both keep their old values.
template <class T, class Expression>
void safe_assign_both(Matrix<T>& a, const Expression& x, Matrix<T>& b, const Expression& y) {
  if (a.rows() == x.rows() && a.cols() == x.cols() && b.rows() == y.rows() &&
      b.cols() == y.cols()) {
    a = x;
    b = y;
    return;
  }
  Matrix<T> new_a = x, new_b = y;
  a.swap(new_a);
  b.swap(new_b);
}

}  // namespace dlnfast
