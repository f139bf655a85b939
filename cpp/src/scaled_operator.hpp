// SPDX-License-Identifier: MIT
// A matrix times a power of two, so that fourth powers of its singular values neither overflow nor
// underflow.
#pragma once

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/safe_resize.hpp"

namespace dlnfast {

// Applies a factor above 1 to the vectors, so that products do not become subnormal, and a factor
// below 1 to the products.
template <class T>
class ScaledOperator final : public LinearOperator<T> {
 public:
  // `scratch` holds scaled vectors; it and `w` must outlive the operator.
  ScaledOperator(const LinearOperator<T>& w, double factor, Matrix<T>& scratch)
      : w_(w), factor_(static_cast<T>(factor)), scratch_(scratch) {}
  Index rows() const override { return w_.rows(); }
  Index cols() const override { return w_.cols(); }
  void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context& context) const override {
    w_.apply(enlarged(x), y, context);
    if (factor_ < T(1)) y.map() *= factor_;
  }
  void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y,
                       const Context& context) const override {
    w_.apply_transpose(enlarged(x), y, context);
    if (factor_ < T(1)) y.map() *= factor_;
  }

 private:
  MatrixRef<const T> enlarged(MatrixRef<const T> x) const {
    if (!(factor_ > T(1))) return x;
    safe_resize(scratch_, x.rows, x.cols);
    scratch_ = factor_ * x.map();
    return scratch_;
  }

  const LinearOperator<T>& w_;
  T factor_;
  Matrix<T>& scratch_;
};

}  // namespace dlnfast
