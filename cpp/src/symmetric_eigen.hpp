// SPDX-License-Identifier: MIT
// The largest eigenvalues of a symmetric matrix in double precision, and their vectors:
//
//   A = Q T Q^T    T tridiagonal, by Householder reflections. The update of A by one reflection and the
//                  product with the next one share a pass over what is left of A: 2 s^3 flops, A read and
//                  written once per reflection.
//   T z = c z      values by bisection with Sturm counts, several at a time in the lanes of a vector;
//                  vectors by inverse iteration, orthogonalised among close values.
//   x = Q z        4 s^2 p flops for p vectors.
//
// Errors of the values are a small multiple of the rounding error of ||A||, whatever their own size.
#pragma once

#include <vector>

#include "dlnfast/random.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

class SymmetricEigen {
 public:
  // Finds the p largest eigenvalues of a symmetric A, whose entries are at most about 1 and of which both
  // triangles are given. Overwrites A; the next call to `find_vectors` reads it.
  void find_values(Matrix<double>& a, Index p);
  // Finds the vectors of these eigenvalues.
  void find_vectors(const Matrix<double>& a, Random& random);

  const std::vector<double>& values() const { return values_; }  // descending
  const Matrix<double>& vectors() const { return vectors_; }     // orthonormal rows

 private:
  void tridiagonalize(Matrix<double>& a);
  void bisect(Index p);
  void iterate_inversely(Random& random);
  void apply_reflections(const Matrix<double>& a);

  std::vector<double> values_;
  Matrix<double> vectors_;
  std::vector<double> diagonal_, off_diagonal_;  // of T
  std::vector<double> tau_;                      // factors of the reflections
};

}  // namespace dlnfast
