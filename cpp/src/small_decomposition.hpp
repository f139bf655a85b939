// SPDX-License-Identifier: MIT
// Singular value decomposition of a small matrix in double precision.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// R = A diag(s) B^T with s descending: A is r x q, B is c x q, for R of shape r x c and q = min(r, c).
struct SmallDecomposition {
  Matrix<double> a, s, b;

  SmallDecomposition(const Matrix<double>& r, const Context& context);

 private:
  // Rotates pairs of rows until all are orthogonal (one-sided Jacobi, Hestenes). Few passes suffice
  // if R is nearly diagonal, as it is between two updates of a tracker. Returns false if they do
  // not; then a, s and b are incomplete.
  bool decompose_by_rotations(const Matrix<double>& r);
};

}  // namespace dlnfast
