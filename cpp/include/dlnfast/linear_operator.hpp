// SPDX-License-Identifier: MIT
// Linear operators: matrices that are known by their products with thin blocks of vectors (rows).
#pragma once

#include <limits>

#include "dlnfast/monitor.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/thin_product.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

template <class T>
class LinearOperator {
 public:
  virtual ~LinearOperator() = default;
  virtual Index rows() const = 0;
  virtual Index cols() const = 0;
  // Y = X W^T for X (k x n): products of W with vectors.
  virtual void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context& context) const = 0;
  // Y = X W for X (k x m): products of W^T with vectors.
  virtual void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y,
                               const Context& context) const = 0;
  // ||W||_F; NaN if it is unknown.
  virtual double norm(const Context& /*context*/) const {
    return std::numeric_limits<double>::quiet_NaN();
  }
};

// Y = X W^T and Y = X W. Use the thin kernels for up to thin_limit rows, otherwise `multiply`.
template <class T>
void block_times_transpose(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                           const Context& context) {
  if (x.rows <= thin_limit) {
    thin_times_transpose<T>(x, w, y, context);
  } else {
    multiply<T>(x, Op::none, w, Op::transpose, y, context);
  }
}

template <class T>
void block_times(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                 const Context& context) {
  if (x.rows <= thin_limit) {
    thin_times<T>(x, w, y, context);
  } else {
    multiply<T>(x, Op::none, w, Op::none, y, context);
  }
}

// Returns ||W||_F^2, summed in double precision in one pass over W. The order of the sum does not
// depend on the number of threads.
template <class T>
double squared_norm(MatrixRef<const T> w, const Context& context);

// Whether a sum of squares is exact to rounding: it did not overflow, and underflow does not
// matter.
inline bool is_exact_square(double square) {
  return square >= 1e-280 && square <= std::numeric_limits<double>::max();
}

// Returns ||W||_F for entries of any size, subnormal numbers included; infinity on overflow or if W
// is not finite. Makes a second pass over W only where squares overflow or underflow.
template <class T>
double norm(MatrixRef<const T> w, const Context& context);

// Copies W to `copy` and returns ||W - copy||_F of before, summed as squared_norm; infinity if its square
// overflows or underflows. One pass over both.
template <class T>
double replace_and_measure(MatrixRef<T> copy, MatrixRef<const T> w, const Context& context);

// Returns tr(A^T B), summed as squared_norm; one pass over both.
template <class T>
double inner_product(MatrixRef<const T> a, MatrixRef<const T> b, const Context& context);

// ||W||_F^2 and tr(W^T B), in one pass.
struct NormAndProduct {
  double squared_norm;
  double inner_product;
};
template <class T>
NormAndProduct norm_and_product(MatrixRef<const T> w, MatrixRef<const T> b, const Context& context);

template <class T>
class MatrixOperator final : public LinearOperator<T> {
 public:
  explicit MatrixOperator(MatrixRef<const T> w) : w_(w) {}
  Index rows() const override { return w_.rows; }
  Index cols() const override { return w_.cols; }
  void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context& context) const override {
    block_times_transpose<T>(x, w_, y, context);
  }
  void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y,
                       const Context& context) const override {
    block_times<T>(x, w_, y, context);
  }
  double norm(const Context& context) const override { return dlnfast::norm<T>(w_, context); }
  const MatrixRef<const T>& matrix() const { return w_; }

 private:
  MatrixRef<const T> w_;
};

extern template NormAndProduct norm_and_product<float>(MatrixRef<const float>,
                                                       MatrixRef<const float>, const Context&);
extern template NormAndProduct norm_and_product<double>(MatrixRef<const double>,
                                                        MatrixRef<const double>, const Context&);
extern template double norm<float>(MatrixRef<const float>, const Context&);
extern template double norm<double>(MatrixRef<const double>, const Context&);
extern template double squared_norm<float>(MatrixRef<const float>, const Context&);
extern template double squared_norm<double>(MatrixRef<const double>, const Context&);
extern template double inner_product<float>(MatrixRef<const float>, MatrixRef<const float>,
                                            const Context&);
extern template double inner_product<double>(MatrixRef<const double>, MatrixRef<const double>,
                                             const Context&);

}  // namespace dlnfast
