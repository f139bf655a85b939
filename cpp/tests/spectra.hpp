// SPDX-License-Identifier: MIT
// Exact singular values, and slowly changing matrices, for the tests of the tracker's parts.
#pragma once

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "dlnfast/singular_values.hpp"
#include "subspace_iteration.hpp"
#include "views.hpp"

namespace check {

inline const dlnfast::Context context{1, nullptr};

inline std::vector<double> spectrum(const Matrix<double>& w) {
  std::vector<double> values(static_cast<std::size_t>(std::min(w.rows(), w.cols())));
  dlnfast::singular_values<double>(
      dlnfast::view(w), MatrixRef<double>(values.data(), 1, static_cast<Index>(values.size())), {},
      {}, context);
  return values;
}

// Returns U diag(s) V^T with random orthonormal U (m x size of s) and V (n x size of s).
inline Matrix<double> matrix_with_values(Index m, Index n, const std::vector<double>& s) {
  const Index r = static_cast<Index>(s.size());
  Matrix<double> u = random_orthonormal(m, r);
  for (Index i = 0; i < r; ++i) u.col(i) *= s[static_cast<std::size_t>(i)];
  return u * random_orthonormal(n, r).transpose();
}

// Returns 1, ratio, ratio^2, ..
inline std::vector<double> geometric(Index n, double ratio) {
  std::vector<double> s(static_cast<std::size_t>(n), 1.0);
  for (std::size_t i = 1; i < s.size(); ++i) s[i] = ratio * s[i - 1];
  return s;
}

// Returns ||M||_2, the norm of W outside the first j pairs.
template <class T>
double norm_outside(const Matrix<double>& w, const dlnfast::SingularPairs<T>& pairs, Index j) {
  const Matrix<double> u = pairs.left.topRows(j).template cast<double>();
  const Matrix<double> x = pairs.right.topRows(j).template cast<double>();
  Matrix<double> m = w - u.transpose() * (u * w);
  m -= (m * x.transpose()).eval() * x;
  return spectrum(m)[0];
}

// Returns the largest entry of |x x^T - 1|.
template <class T>
double departure_from_orthonormal(const Matrix<T>& x) {
  const Matrix<double> rows = x.template cast<double>();
  return distance(Matrix<double>(rows * rows.transpose()),
                  Matrix<double>(Matrix<double>::Identity(rows.rows(), rows.rows())));
}

}  // namespace check
