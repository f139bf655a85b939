// SPDX-License-Identifier: MIT
#include "origin_bound.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "views.hpp"

namespace dlnfast {

template <class T>
template <class Multiply>
double OriginProduct<T>::update(const Matrix<T>& x, const Multiply& multiply_by_origin,
                                Index& n_columns, const Context& context) {
  const Index p = x.rows();
  if (vectors_.rows() == p) {
    Matrix<T> rotation(p, p);
    multiply<T>(view(x), Op::none, view(vectors_), Op::transpose, MatrixRef<T>(rotation), context);
    Matrix<T> complement = x;
    multiply<T>(T(-1), view(rotation), Op::none, view(vectors_), Op::none, T(1),
                MatrixRef<T>(complement), context);
    const double outside = static_cast<double>(complement.norm());
    if (error_ + outside <= 256.0 * epsilon<T>()) {
      Matrix<T> old = product_;
      multiply<T>(view(rotation), Op::none, view(old), Op::none, MatrixRef<T>(product_), context);
      safe_assign(vectors_, x);
      error_ += outside + 8.0 * epsilon<T>();
      return error_;
    }
  }
  multiply_by_origin(x, product_);
  n_columns += p;
  safe_assign(vectors_, x);
  error_ = 0.0;
  return error_;
}

template <class T>
void OriginBound<T>::set(MatrixRef<const T> origin) {
  origin_ = origin;
  norm_ = {};
}

template <class T>
void OriginBound<T>::initialize(MatrixRef<const T> w, double squared_norm, const Bound& norm) {
  if (w.data != origin_.data && (w.map() - origin_.map()).cwiseAbs().maxCoeff() != T(0)) return;
  squared_norm_ = squared_norm;
  norm_ = norm;
}

template <class T>
double OriginBound<T>::measure(const MatrixRef<const T>* w, std::int64_t number,
                               const Context& context) {
  is_compared_ = w != nullptr && norm_.kind != Completeness::none && schedule_.is_due(number);
  if (!is_compared_) return nan;
  const NormAndProduct both = norm_and_product<T>(*w, origin_, context);
  const double norm = std::sqrt(both.squared_norm);
  inner_product_ = both.inner_product;
  // Products with W_0 are computed before they are scaled, so they must not underflow.
  is_compared_ = is_exact_square(both.squared_norm) &&
                 norm >= std::sqrt(static_cast<double>(std::numeric_limits<T>::min()));
  return is_compared_ ? norm : nan;
}

template <class T>
void OriginBound<T>::set_unit(double factor) {
  factor_ = factor;
  inner_product_ = inner_product_ * factor * factor;
}

template <class T>
void OriginBound<T>::reset() {
  norm_ = {};
  left_product_ = right_product_ = {};
  is_compared_ = false;
}

template <class T>
Bound OriginBound<T>::compare(const SubspaceIteration<T>& subspace, double squared_norm,
                              Index& n_columns, const Context& context) {
  const Matrix<T>&left = subspace.measured().left, &right = subspace.measured().right;
  const Index p = subspace.size();
  // Error of the products U W_0 and X W_0^T in the Frobenius norm, relative to |W_0|.
  double outside = left_product_.update(
      left,
      [&](const Matrix<T>& x, Matrix<T>& y) {
        safe_resize(y, p, origin_.cols);
        block_times<T>(top(x, p), origin_, MatrixRef<T>(y), context);
        y *= static_cast<T>(factor_);
      },
      n_columns, context);
  outside += right_product_.update(
      right,
      [&](const Matrix<T>& x, Matrix<T>& y) {
        safe_resize(y, p, origin_.rows);
        block_times_transpose<T>(top(x, p), origin_, MatrixRef<T>(y), context);
        y *= static_cast<T>(factor_);
      },
      n_columns, context);
  const Matrix<T>& left_product = left_product_.value();
  const Matrix<T>& right_product = right_product_.value();
  Matrix<T> corner(p, p);
  multiply<T>(top(left, p), Op::none, top(right_product, p), Op::transpose, MatrixRef<T>(corner),
              context);
  const auto squares = [&](const Matrix<T>& x) {
    return dlnfast::squared_norm<T>(view(x), context);
  };
  // (2): squared norms of M_0 and M, and their inner product.
  const double of_origin =
      squared_norm_ - squares(left_product) - squares(right_product) + squares(corner);
  const double of_w = squared_norm - squares(image_);
  const double between =
      inner_product_ - inner_product<T>(top(image_, p), top(left_product, p), context);
  const double c = of_origin > 0.0 ? between / of_origin : 0.0;
  const double rounding = 64.0 * epsilon<T>() * (squared_norm + square(c) * squared_norm_);
  const double difference = of_w - 2.0 * c * between + square(c) * of_origin;
  // Each of the products has a norm of at most |W_0| sqrt(p), or that of Z.
  const double images = std::sqrt(squared_norm) + std::abs(c) * std::sqrt(squared_norm_);
  const double error = 4.0 * outside * std::abs(c) * norm_.value * images;
  const double value =
      std::abs(c) * norm_.value + std::sqrt(std::max(difference, 0.0) + rounding + error);
  return {value + subspace.rounding_bound(), norm_.kind};
}

template class OriginBound<float>;
template class OriginBound<double>;

}  // namespace dlnfast
