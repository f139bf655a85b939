// SPDX-License-Identifier: MIT
// Bound on the complement of the tracked pairs, by the matrix W_0 of the first update, whose norm is known.
//
// With M and M_0 the complements of the p measured pairs (subspace_iteration.hpp) in W and W_0,
//
//   |M| <= |c| |W_0| + || M - c M_0 ||_F                                                         (1)
//
// for any c; the best one is tr(M^T M_0) / ||M_0||_F^2. This is sharp where W differs from c W_0 in few
// directions, which the pairs hold. As W x_i = s_i u_i, M = W - U^T U W, and with Z = U W all of
//
//   ||M||_F^2      = ||W||_F^2 - ||Z||_F^2
//   tr(M^T M_0)    = tr(W^T W_0) - tr(Z^T U W_0)                                                 (2)
//   ||M_0||_F^2    = ||W_0||_F^2 - ||U W_0||_F^2 - ||X W_0^T||_F^2 + ||U W_0 X^T||_F^2
//
// follow from inner products: one pass over W and W_0, and 4 m n p flops for U W_0 and X W_0^T. These
// products are kept: where the pairs only turn within their subspace, the products turn with them.
#pragma once

#include <cstdint>

#include "dlnfast/linear_operator.hpp"
#include "subspace_iteration.hpp"
#include "tail_bounds.hpp"

namespace dlnfast {

// The product of vectors (rows) with W_0, from update to update.
template <class T>
class OriginProduct {
 public:
  const Matrix<T>& value() const { return product_; }
  // Brings the product up to date for x, by `multiply(x, product)` only where x has left the subspace of
  // before. Returns a bound on its error relative to ||W_0||, and adds the number of multiplied
  // vectors to `n_columns`.
  template <class Multiply>
  double update(const Matrix<T>& x, const Multiply& multiply, Index& n_columns,
                const Context& context);

 private:
  Matrix<T> vectors_, product_;
  double error_ = 0.0;
};

template <class T>
class OriginBound {
 public:
  // W_0 stays where it is and must not change.
  void set(MatrixRef<const T> origin);
  // The matrix of the first update was `w`, in a unit of `factor`. If it is W_0, its largest value is at
  // most `norm`.
  void begin(MatrixRef<const T> w, double squared_norm, const Bound& norm);
  bool is_set() const { return !origin_.absent(); }

  // Decides whether update `number` compares with W_0, and measures W for that: returns ||W||_F, NaN where
  // nothing is compared. `w` is null for an operator.
  double measure(const MatrixRef<const T>* w, std::int64_t number, const Context& context);
  bool is_compared() const { return is_compared_; }
  // The unit of the tracker is `factor`; `forget` where it has changed since the update before.
  void set_unit(double factor);
  void forget();

  // Where a sweep leaves Z for `compare`; null where nothing is compared.
  Matrix<T>* image() { return is_compared_ ? &image_ : nullptr; }
  // (1), for all p measured pairs; adds the number of vectors multiplied by W_0 to `n_columns`.
  Bound compare(const SubspaceIteration<T>& subspace, double squared_norm, Index& n_columns,
                const Context& context);
  // Comparisons that do not help become rarer: the next one at least 1, 3, 7, .. 63 updates later.
  void schedule(bool helped, std::int64_t number);

 private:
  MatrixRef<const T> origin_;
  Bound norm_;                  // of W_0
  double squared_norm_ = 0.0;   // ||W_0||_F^2
  double inner_product_ = 0.0;  // tr(W^T W_0)
  double factor_ = 1.0;
  bool is_compared_ = false;
  std::int64_t due_ = 0, wait_ = 0;
  Matrix<T> image_;                      // Z
  OriginProduct<T> of_left_, of_right_;  // U W_0, X W_0^T
};

extern template class OriginBound<float>;
extern template class OriginBound<double>;

}  // namespace dlnfast
