// SPDX-License-Identifier: MIT
#include "polar_factor.hpp"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "dlnfast/product.hpp"
#include "fixed_products.hpp"
#include "small_decomposition.hpp"

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

// The polar factor of `scaled`, which is `magnitude` times smaller than X: with orthogonal rows
// Q R = diag(s) V^T, it is Q^T V^T over the values that count.
template <class T>
double polar_by_rotations(const MatrixRef<T>& x, const Matrix<double>& scaled, double magnitude,
                          double other, double rank_tolerance) {
  constexpr int most_passes = 40;
  const bool is_tall = scaled.rows() > scaled.cols();
  Matrix<double> rows = is_tall ? Matrix<double>(scaled.transpose()) : scaled;
  Matrix<double> rotation;
  rotate_rows(rows, rotation, most_passes);
  double largest = other / magnitude;
  for (Index i = 0; i < rows.rows(); ++i) largest = std::max(largest, rows.row(i).norm());
  for (Index i = 0; i < rows.rows(); ++i) {
    const double value = rows.row(i).norm();
    if (value > rank_tolerance * largest) {
      rows.row(i) /= value;
    } else {
      rows.row(i).setZero();
    }
  }
  if (is_tall) {
    x.map() = (rows.transpose() * rotation).template cast<T>();
  } else {
    x.map() = (rotation.transpose() * rows).template cast<T>();
  }
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
  make_if_fits(std::integral_constant<int, 4>{});
  make_if_fits(std::integral_constant<int, 6>{});
  make_if_fits(std::integral_constant<int, 8>{});
  make_if_fits(std::integral_constant<int, 12>{});
  make_if_fits(std::integral_constant<int, 16>{});
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
  if (wide.size() == 0) return other;
  // A common factor, so that squares neither overflow nor underflow. It is not exact: then the
  // matrix is zero or not finite.
  const double magnitude = wide.cwiseAbs().maxCoeff();
  if (!(magnitude > 0.0) || !std::isfinite(magnitude)) return std::max(magnitude, other);
  wide /= magnitude;
  if (std::min(wide.rows(), wide.cols()) <= rotations_limit) {
    return polar_by_rotations<T>(x, wide, magnitude, other, rank_tolerance);
  }
  const SmallDecomposition d(wide, context);
  const double largest = std::max(d.s(0, 0) * magnitude, other);
  Index rank = 0;
  while (rank < d.s.cols() && d.s(0, rank) * magnitude > rank_tolerance * largest) ++rank;
  x.map() = (d.a.leftCols(rank) * d.b.leftCols(rank).transpose()).template cast<T>();
  return largest;
}

Matrix<double> inverse_fourth_root(const MatrixRef<double>& p) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(p.map());
  // Rounding may turn small eigenvalues negative.
  const double least = 1e-16 * std::max(solver.eigenvalues().cwiseAbs().maxCoeff(), 1e-300);
  const Eigen::VectorXd roots =
      solver.eigenvalues().unaryExpr([&](double v) { return std::pow(std::max(v, least), -0.25); });
  return solver.eigenvectors() * roots.asDiagonal() * solver.eigenvectors().transpose();
}

template std::unique_ptr<NewtonSchulz<float>> newton_schulz<float>(Index, Index);
template std::unique_ptr<NewtonSchulz<double>> newton_schulz<double>(Index, Index);
template double polar_factor(const MatrixRef<float>&, double, double, const Context&);
template double polar_factor(const MatrixRef<double>&, double, double, const Context&);

}  // namespace dlnfast
