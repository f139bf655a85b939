// SPDX-License-Identifier: MIT
#include "polar_factor.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/product.hpp"
#include "fixed_products.hpp"
#include "small_decomposition.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Three products of 2 n^3 flops and a transpose for each iteration, in the first-level cache.
template <class T, int Size>
class FixedNewtonSchulz final : public NewtonSchulz<T>, private FixedProducts<T, Size> {
  using Products = FixedProducts<T, Size>;
  using Block = typename Products::Block;
  using P = typename Products::P;
  using Vector = typename Products::Vector;

 public:
  explicit FixedNewtonSchulz(Index size) : Products(size) {}

  void iterate(const MatrixRef<T>& x, const Optimizer& optimizer, const Context&) override {
    const T a = static_cast<T>(optimizer.coefficients[0]);
    const T b = static_cast<T>(optimizer.coefficients[1]);
    const T c = static_cast<T>(optimizer.coefficients[2]);
    this->load(x, x_[0]);
    int now = 0;
    for (Index i = 0; i < optimizer.iterations; ++i, now = 1 - now) {
      this->transpose(x_[now], transposed_);
      this->multiply(x_[now], transposed_, this->into(gram_));
      this->multiply(gram_, gram_, [&](int at, const Vector& v) DLNFAST_INLINE {
        P::store(polynomial_.a + at, P::load(gram_.a + at) * b + v * c);
      });
      this->multiply(polynomial_, x_[now], [&](int at, const Vector& v) DLNFAST_INLINE {
        P::store(x_[1 - now].a + at, P::load(x_[now].a + at) * a + v);
      });
    }
    this->store(x_[now], x);
  }

 private:
  Block x_[2], transposed_, gram_, polynomial_;
};

// For any size. The Gram matrix is that of the smaller side.
template <class T>
class GeneralNewtonSchulz final : public NewtonSchulz<T> {
 public:
  GeneralNewtonSchulz(Index rows, Index cols) : wide_(rows <= cols) {
    const Index side = std::min(rows, cols);
    gram_.resize(side, side);
    polynomial_.resize(side, side);
    next_.resize(rows, cols);
  }

  void iterate(const MatrixRef<T>& x, const Optimizer& optimizer, const Context& context) override {
    const T a = static_cast<T>(optimizer.coefficients[0]);
    const T b = static_cast<T>(optimizer.coefficients[1]);
    const T c = static_cast<T>(optimizer.coefficients[2]);
    const MatrixRef<T> gram(gram_), polynomial(polynomial_), next(next_);
    for (Index i = 0; i < optimizer.iterations; ++i) {
      if (wide_) {
        multiply<T>(x, Op::none, x, Op::transpose, gram, context);
      } else {
        multiply<T>(x, Op::transpose, x, Op::none, gram, context);
      }
      polynomial_ = gram_;
      multiply<T>(c, gram, Op::none, gram, Op::none, b, polynomial, context);
      next_ = x.map();
      if (wide_) {
        multiply<T>(T(1), polynomial, Op::none, x, Op::none, a, next, context);
      } else {
        multiply<T>(T(1), x, Op::none, polynomial, Op::none, a, next, context);
      }
      x.map() = next_;
    }
  }

 private:
  bool wide_;
  Matrix<T> gram_, polynomial_, next_;
};

// Replaces X by its polar factor (polar_factor.hpp).
double make_polar(Matrix<double>& x, double other, double rank_tolerance, const Context& context) {
  // A common factor, so that squares neither overflow nor underflow. It is not exact: then the
  // matrix is zero or not finite.
  const double magnitude = x.size() == 0 ? 0.0 : x.cwiseAbs().maxCoeff();
  if (!(magnitude > 0.0) || !std::isfinite(magnitude)) return std::max(magnitude, other);
  x /= magnitude;
  Matrix<double> left, right;  // X = left^T right with orthogonal rows, those of `left` normal
  const bool is_tall = x.rows() > x.cols();
  if (std::min(x.rows(), x.cols()) <= rotations_limit) {
    constexpr int most_passes = 40;
    right = x;
    if (is_tall) right = x.transpose();
    rotate_rows(right, left, most_passes);
    if (is_tall) std::swap(left, right);
  } else {
    const SmallDecomposition d(x, context);
    left = d.a.transpose();
    right = d.b.transpose();
    for (Index i = 0; i < right.rows(); ++i) right.row(i) *= d.s(0, i);
  }
  Matrix<double>& scaled = is_tall && left.rows() <= rotations_limit ? left : right;
  double largest = other / magnitude;
  for (Index i = 0; i < scaled.rows(); ++i) largest = std::max(largest, scaled.row(i).norm());
  for (Index i = 0; i < scaled.rows(); ++i) {
    const double value = scaled.row(i).norm();
    scaled.row(i) *= value > rank_tolerance * largest ? 1.0 / value : 0.0;
  }
  multiply<double>(view(left), Op::transpose, view(right), Op::none, MatrixRef<double>(x), context);
  return largest * magnitude;
}

}  // namespace

template <class T>
std::unique_ptr<NewtonSchulz<T>> newton_schulz(Index rows, Index cols) {
  const Index size = std::max(rows, cols);
  std::unique_ptr<NewtonSchulz<T>> result;
  const auto make_if_fits = [&](auto limit) {
    if (result == nullptr && size <= limit)
      result = std::make_unique<FixedNewtonSchulz<T, limit>>(size);
  };
  // Few sizes: each takes a second to compile.
  make_if_fits(std::integral_constant<int, 6>{});
  make_if_fits(std::integral_constant<int, 12>{});
  make_if_fits(std::integral_constant<int, 20>{});
  make_if_fits(std::integral_constant<int, small_limit>{});
  if (result == nullptr) result = std::make_unique<GeneralNewtonSchulz<T>>(rows, cols);
  return result;
}

double newton_schulz(double x, const Optimizer& optimizer) {
  const std::vector<double>& c = optimizer.coefficients;
  for (Index i = 0; i < optimizer.iterations; ++i) {
    const double square = x * x;
    x = c[0] * x + (c[1] * square + c[2] * square * square) * x;
  }
  return x;
}

template <class T>
double polar_factor(const MatrixRef<T>& x, double other, double rank_tolerance,
                    const Context& context) {
  Matrix<double> wide = x.map().template cast<double>();
  const double largest = make_polar(wide, other, rank_tolerance, context);
  x.map() = wide.template cast<T>();
  return largest;
}

Matrix<double> inverse_fourth_root(const MatrixRef<double>& p, const Context& context) {
  // The singular values of a positive definite matrix are its eigenvalues, and both sets of vectors
  // are its eigenvectors.
  const SmallDecomposition d(p.map(), context);
  if (d.s.size() == 0) return Matrix<double>(p.rows, p.cols);
  const double least = 1e-16 * std::max(d.s(0, 0), 1e-300);
  Matrix<double> scaled = d.a, root(p.rows, p.cols);
  for (Index i = 0; i < scaled.cols(); ++i)
    scaled.col(i) *= std::pow(std::max(d.s(0, i), least), -0.25);
  multiply<double>(view(scaled), Op::none, view(d.b), Op::transpose, root, context);
  return root;
}

template std::unique_ptr<NewtonSchulz<float>> newton_schulz<float>(Index, Index);
template std::unique_ptr<NewtonSchulz<double>> newton_schulz<double>(Index, Index);
template double polar_factor(const MatrixRef<float>&, double, double, const Context&);
template double polar_factor(const MatrixRef<double>&, double, double, const Context&);

}  // namespace dlnfast
