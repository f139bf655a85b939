// SPDX-License-Identifier: MIT
// The largest singular values of a matrix, and their vectors, from Gram matrices in double precision:
//
//   G = W W^T or W^T W, whichever is smaller,   G x_i = s_i^2 x_i,   y_i = W^T x_i / s_i or W x_i / s_i
//
// With sides s <= l: 2 s^2 l + 2 s^3 flops for the values, and 4 s^2 p + 2 s l p for p pairs of vectors,
// a fraction of an SVD of W. G and its eigenvalues have a rounding error of at most
// delta = (l + 8 s) epsilon ||W||_F^2, hence
//
//   |s_i - sigma_i| <= min(delta / s_i, sqrt(delta)),                                        (1)
//
// which is poor for small values. Where it exceeds a tolerance, the leading j pairs, down to a value s_j, are
// taken out of W, and what is left is decomposed in the same way, at its own scale. With P the projection onto
// x_1 .. x_j, the rows of P W and (1 - P) W have inner products of at most delta, so that the singular values
// of W differ from those of both parts together by at most
//
//   delta / s_j + c epsilon ||W||_F.                                                          (2)
#pragma once

#include <vector>

#include "dlnfast/monitor.hpp"
#include "dlnfast/random.hpp"
#include "symmetric_eigen.hpp"

namespace dlnfast {

class GramDecomposition {
 public:
  // Decomposes W (m x n), which must be finite and of size about 1: p values, the first k of them with errors
  // of at most `tolerance` times the largest, unless rounding of W itself is larger. Vectors of values that
  // are lost in rounding errors are random ones, orthogonal to the others. The result depends on W alone.
  template <class T>
  void compute(MatrixRef<const T> w, Index p, Index k, double tolerance, bool with_vectors,
               const Context& context);

  const std::vector<double>& values() const { return values_; }  // p, descending
  // Bounds on |values()[i] - sigma_i|.
  const std::vector<double>& errors() const { return errors_; }
  // Bound on sqrt(||sin U||_F^2 + ||sin V||_F^2) of the first j vectors; NaN without a gap after them.
  double angle_error(Index j) const;
  // Rows: p x m and p x n.
  const Matrix<double>& left() const { return is_wide_ ? x_ : y_; }
  const Matrix<double>& right() const { return is_wide_ ? y_ : x_; }

 private:
  // Finds the eigenvalues for the pairs from `begin` of what is left of W; returns its ||W||_F^2.
  double decompose(Index begin, const Context& context);
  // Sets y_i = W^T x_i or W x_i, not normalised, for pairs begin .. end - 1, and takes them out of W.
  void project(Index begin, Index end, const Context& context);

  SymmetricEigen eigen_;
  Matrix<double> w_;  // what is left of W
  Matrix<double> gram_;
  Matrix<double> x_, y_;  // vectors of the smaller and of the larger side
  std::vector<double> values_, errors_;
  bool is_wide_ = true;  // m <= n
};

}  // namespace dlnfast
