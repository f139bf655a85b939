// SPDX-License-Identifier: MIT
// Bound on the complement of the tracked pairs from the matrix W_0 of the first update, whose norm
// is known.
//
// With M and M_0 the complements of the p measured pairs (subspace_iteration.hpp) in W and W_0,
//
//   |M| <= |c| |W_0| + || M - c M_0 ||_F                                                         (1)
//
// for any c; the best one is tr(M^T M_0) / ||M_0||_F^2. This is sharp if the pairs contain the few
// directions in which W differs from c W_0. As W x_i = s_i u_i, M = W - U^T U W, and with Z = U W
// all of
//
//   ||M||_F^2      = ||W||_F^2 - ||Z||_F^2
//   tr(M^T M_0)    = tr(W^T W_0) - tr(Z^T U W_0)                                                 (2)
//   ||M_0||_F^2    = ||W_0||_F^2 - ||U W_0||_F^2 - ||X W_0^T||_F^2 + ||U W_0 X^T||_F^2
//
// follow from inner products: one pass over W and W_0, and 4 m n p flops for U W_0 and X W_0^T.
// These products are stored: if the pairs only rotate within their subspace, the products rotate
// with them.
#pragma once

#include <cstdint>

#include "dlnfast/linear_operator.hpp"
#include "retry_schedule.hpp"
#include "subspace_iteration.hpp"
#include "tail_bounds.hpp"

namespace dlnfast {

// The product of vectors (rows) with W_0, reused from update to update.
template <class T>
class OriginProduct {
 public:
  const Matrix<T>& value() const { return product_; }
  // Updates the product for x. Calls `multiply(x, product)` only if x has left the previous
  // subspace. Returns a bound on the error relative to ||W_0||, and adds the number of multiplied
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
  // Stores a reference to W_0, which must not change.
  void set(MatrixRef<const T> origin);
  // Reports the matrix `w` of the first update. If it equals W_0, `norm` bounds its largest
  // singular value.
  void initialize(MatrixRef<const T> w, double squared_norm, const Bound& norm);
  bool is_set() const { return !origin_.absent(); }

  // Decides whether update `number` compares W with W_0, and if so measures W. Returns ||W||_F, or
  // NaN without a comparison. `w` is null for an operator.
  double measure(const MatrixRef<const T>* w, std::int64_t number, const Context& context);
  bool is_compared() const { return is_compared_; }
  // Sets the unit of the tracker. Call `reset` if it has changed since the previous update.
  void set_unit(double factor);
  void reset();

  // Where a sweep stores Z for `compare`; null without a comparison.
  Matrix<T>* image() { return is_compared_ ? &image_ : nullptr; }
  // Returns (1) for all p measured pairs, and adds the number of vectors multiplied by W_0 to
  // `n_columns`.
  Bound compare(const SubspaceIteration<T>& subspace, double squared_norm, Index& n_columns,
                const Context& context);
  // Plans the next comparison: after comparisons without success, at least 1, 3, 7, .. 63 updates
  // later.
  void schedule(bool helped, std::int64_t number) { schedule_.report(helped, number); }

 private:
  MatrixRef<const T> origin_;
  Bound norm_;                  // of W_0
  double squared_norm_ = 0.0;   // ||W_0||_F^2
  double inner_product_ = 0.0;  // tr(W^T W_0)
  double factor_ = 1.0;
  bool is_compared_ = false;
  RetrySchedule schedule_;
  Matrix<T> image_;                                // Z
  OriginProduct<T> left_product_, right_product_;  // U W_0, X W_0^T
};

extern template class OriginBound<float>;
extern template class OriginBound<double>;

}  // namespace dlnfast
