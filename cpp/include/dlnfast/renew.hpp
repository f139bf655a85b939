// SPDX-License-Identifier: MIT
// New sizes for matrices that have some already. Eigen 3.4 frees first and forgets only afterwards:
// where there is no memory for the new sizes, the matrix would be freed once more with its owner.
#pragma once

#include "dlnfast/types.hpp"

namespace dlnfast {

// Leaves a matrix that could not be allocated without entries.
template <class T>
void renew(Matrix<T>& m, Index rows, Index cols) {
  if (m.rows() == rows && m.cols() == cols) return;
  m.resize(0, 0);
  m.resize(rows, cols);
}

// m = x, for an x without part in m.
template <class T, class Expression>
void renew_as(Matrix<T>& m, const Expression& x) {
  renew(m, x.rows(), x.cols());
  m = x;
}

// Both, or neither where their sizes change.
template <class T, class Expression>
void renew_both(Matrix<T>& a, const Expression& x, Matrix<T>& b, const Expression& y) {
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
