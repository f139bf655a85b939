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
  // One-sided rotations of the rows (Hestenes' Jacobi method) until all pairs are orthogonal. Few passes
  // are enough where R is nearly diagonal, as it is between two updates of a tracker. Returns false, with
  // a, s and b unchanged or incomplete, where they are not.
  bool decompose_by_rotations(const Matrix<double>& r);
};

}  // namespace dlnfast
