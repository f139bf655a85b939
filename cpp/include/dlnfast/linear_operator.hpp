// SPDX-License-Identifier: MIT
// A matrix given by its products with thin blocks of vectors, which are rows.
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
  // Y = X W^T for X (k x n): W times vectors.
  virtual void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context& context) const = 0;
  // Y = X W for X (k x m): W^T times vectors.
  virtual void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y,
                               const Context& context) const = 0;
  // ||W||_F, NaN where only the products are known.
  virtual double norm(const Context& /*context*/) const {
    return std::numeric_limits<double>::quiet_NaN();
  }
};

// Y = X W^T and Y = X W: by the kernels for thin blocks up to thin_limit rows, by `multiply` above.
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

// ||W||_F^2 in double precision, in one pass over W. The order of the sum does not depend on the number of
// threads.
template <class T>
double squared_norm(MatrixRef<const T> w, const Context& context);

// Whether a sum of squares is exact to rounding: no square overflowed, and none that vanished matters.
inline bool is_exact_square(double square) {
  return square >= 1e-280 && square <= std::numeric_limits<double>::max();
}

// ||W||_F for entries of any size, subnormal numbers included; infinite where it overflows or W is not
// finite. Makes a second pass over W only where squares are out of range.
template <class T>
double norm(MatrixRef<const T> w, const Context& context);

// tr(A^T B), summed in the same way; one pass over both.
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
