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
  // Returns false if a few passes of rotations do not suffice; then a, s and b are incomplete. They do
  // if R is nearly diagonal, as it is between two updates of a tracker.
  bool decompose_by_rotations(const Matrix<double>& r);
};

// Largest number of rows for which rotations are faster than a general decomposition.
inline constexpr Index rotations_limit = 40;

// Rotates pairs of rows of R until all are orthogonal (one-sided Jacobi, Hestenes), at most `max_passes`
// times all pairs: `rows` becomes Q R with the orthogonal Q = `rotation`. Returns whether they are
// orthogonal.
bool rotate_rows(Matrix<double>& rows, Matrix<double>& rotation, int max_passes);

}  // namespace dlnfast
