// SPDX-License-Identifier: MIT
#include "gram_certificate.hpp"

#include <algorithm>
#include <cmath>

#include "cholesky.hpp"
#include "gram_matrix.hpp"
#include "lower_product.hpp"
#include "numbers.hpp"
#include "views.hpp"

namespace dlnfast {

template <class T>
double bound_complement(MatrixRef<const T> w, double factor, const SingularPairs<T>& pairs, Index j,
                        double tau, const Context& context) {
  Matrix<double> a;
  lower_gram<T>(w, factor, a, context);
  const double squared_norm = a.trace();
  a *= -1.0;
  a.diagonal().array() += square(tau);
  const Matrix<T>& vectors = w.rows <= w.cols ? pairs.left : pairs.right;
  const Matrix<double> x = vectors.topRows(j).template cast<double>();
  Matrix<double> scaled = x;
  for (Index i = 0; i < j; ++i) scaled.row(i) *= 2.0 * square(pairs.values[i]) + square(tau);
  multiply_lower(1.0, view(x), view(scaled), Op::transpose, 1.0, MatrixRef<double>(a), context);
  const double larger = static_cast<double>(std::max(w.rows, w.cols));
  const double smaller = static_cast<double>(a.rows());
  const double rounding =
      (larger + 8.0) * squared_norm + (smaller + 2.0 * static_cast<double>(j) + 16.0) * a.trace();
  if (!is_positive_definite(MatrixRef<double>(a), context)) return infinity;
  return std::sqrt(square(tau) + epsilon<double>() * rounding);
}

template double bound_complement<float>(MatrixRef<const float>, double, const SingularPairs<float>&,
                                        Index, double, const Context&);
template double bound_complement<double>(MatrixRef<const double>, double,
                                         const SingularPairs<double>&, Index, double,
                                         const Context&);

}  // namespace dlnfast
