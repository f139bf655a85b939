// SPDX-License-Identifier: MIT
#include "dlnfast/singular_values.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::random_matrix;
using check::random_orthonormal;
using Values = std::vector<double>;

namespace {

Values of_bidiagonal(const Values& diagonal, const Values& superdiagonal, Index k) {
  return bidiagonal_singular_values(as_array(diagonal), as_array(superdiagonal), k);
}

// One-sided Jacobi rotations: slow, but simple and accurate for small values too.
Values jacobi_values(const Matrix<double>& m) {
  Matrix<double> a = m.rows() < m.cols() ? Matrix<double>(m.transpose()) : m;
  for (int sweep = 0; sweep < 40; ++sweep) {
    bool rotated = false;
    for (Index p = 0; p < a.cols(); ++p) {
      for (Index q = p + 1; q < a.cols(); ++q) {
        const double pp = a.col(p).squaredNorm(), qq = a.col(q).squaredNorm();
        const double pq = a.col(p).dot(a.col(q));
        if (std::abs(pq) <= 1e-16 * std::sqrt(pp * qq)) continue;
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = (zeta > 0 ? 1.0 : -1.0) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1.0 / std::hypot(1.0, t), s = c * t;
        for (Index i = 0; i < a.rows(); ++i) {
          const double x = a(i, p), y = a(i, q);
          a(i, p) = c * x - s * y;
          a(i, q) = s * x + c * y;
        }
      }
    }
    if (!rotated) break;
  }
  Values values;
  for (Index j = 0; j < a.cols(); ++j) values.push_back(a.col(j).norm());
  std::sort(values.begin(), values.end(), std::greater<>());
  return values;
}

// Compares values and vectors of W, all and the first few, with the expected values.
template <class T>
void check_decomposition(const Matrix<double>& exact, const Values& wanted) {
  Matrix<T> w = exact.template cast<T>();
  const Index smaller = std::min(w.rows(), w.cols());
  const double top = wanted.empty() ? 0.0 : wanted[0];
  const double allowed = 4 * check::tolerance<T>(std::max(w.rows(), w.cols())) * top;
  for (const Index k : {smaller, std::min<Index>(3, smaller), Index(0)}) {
    check::Strided<T> input(w, 2);
    Matrix<T> values(1, k), left(w.rows(), k), right(w.cols(), k), again(1, k);
    singular_values<T>(MatrixRef<T>(input.ref()), values, {}, {}, Context{});
    CHECK(input.is_intact() && input.value() == w);
    for (Index i = 0; i < k; ++i) {
      CHECK_NEAR(values(0, i), wanted[static_cast<std::size_t>(i)], allowed);
      CHECK(values(0, i) >= T(0));
      CHECK(i == 0 || values(0, i) <= values(0, i - 1));
    }
    singular_values<T>(MatrixRef<T>(input.ref()), again, left, right, Context{});
    if (k == 0) continue;
    CHECK_NEAR(check::distance(values, again), 0.0, allowed);
    const Matrix<double> u = left.template cast<double>(), v = right.template cast<double>();
    const Matrix<double> residual =
        exact * v - u * again.row(0).template cast<double>().asDiagonal();
    const double orthonormal = 4 * check::tolerance<T>(std::max(w.rows(), w.cols()));
    CHECK(residual.norm() <= 4 * allowed + 1e-300);
    CHECK_NEAR((u.transpose() * u - Matrix<double>::Identity(k, k)).norm(), 0.0, 4 * orthonormal);
    CHECK_NEAR((v.transpose() * v - Matrix<double>::Identity(k, k)).norm(), 0.0, 4 * orthonormal);
    // One side only.
    Matrix<T> one_side(w.rows(), k), other_side(w.cols(), k);
    singular_values<T>(MatrixRef<T>(input.ref()), again, one_side, {}, Context{});
    CHECK(one_side == left);
    singular_values<T>(MatrixRef<T>(input.ref()), again, {}, other_side, Context{});
    CHECK(other_side == right);
  }
}

Matrix<double> with_spectrum(Index rows, Index cols, const Values& values) {
  const Index k = static_cast<Index>(values.size());
  const Matrix<double> u = random_orthonormal(rows, k), v = random_orthonormal(cols, k);
  const Eigen::Map<const Eigen::VectorXd> s(values.data(), k);
  return u * s.asDiagonal() * v.transpose();
}

template <class T>
void known_spectra_are_found() {
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{{1, 1},
                                                                       {1, 9},
                                                                       {9, 1},
                                                                       {2, 2},
                                                                       {5, 3},
                                                                       {15, 15},
                                                                       {16, 16},
                                                                       {17, 40},
                                                                       {60, 33},
                                                                       {90, 90}}) {
    const Index k = std::min(rows, cols);
    const std::size_t n = static_cast<std::size_t>(k);
    std::vector<Values> spectra;
    spectra.emplace_back(n, 1.0);  // all equal
    spectra.emplace_back(n, 0.0);
    Values clusters(n, 0.3), few(n, 0.0), near(n), graded(n), split(n, 0.7);
    for (std::size_t i = 0; i < n; ++i) {
      if (i < n / 3) clusters[i] = 1.0;
      if (i < 3) few[i] = 3.0 - double(i);  // rank 3
      near[i] = 1.0 + 1e-10 * double(n - i);
      graded[i] = std::pow(10.0, -0.25 * double(i));
      if (i < 4) split[i] = 2.0 - 0.1 * double(i);  // some above, some below, a cluster in between
      if (i + 4 >= n && n > 8) split[i] = 0.1 * double(n - i);
    }
    for (const auto& s : {clusters, few, near, graded, split}) spectra.push_back(s);
    for (const Values& s : spectra) {
      check_decomposition<T>(with_spectrum(rows, cols, s), s);
      for (const double scale : {1e-12, 1e12}) {
        Values scaled = s;
        for (double& x : scaled) x *= scale;
        check_decomposition<T>(with_spectrum(rows, cols, scaled), scaled);
      }
    }
    check_decomposition<T>(Matrix<double>::Identity(rows, cols), Values(n, 1.0));
    const auto w = random_matrix<double>(rows, cols);
    check_decomposition<T>(w, jacobi_values(w));
  }
  check_decomposition<T>(Matrix<double>(0, 4), {});
  check_decomposition<T>(Matrix<double>(4, 0), {});
}

void sizes_are_checked() {
  Matrix<double> w(4, 6), five(1, 5), three(1, 3), column(3, 1), left(4, 3), right(6, 3),
      wrong(5, 3);
  const auto run = [&](Matrix<double>& values, MatrixRef<double> l, MatrixRef<double> r) {
    singular_values<double>(MatrixRef<double>(w), values, l, r, Context{});
  };
  w.setIdentity();
  run(three, left, right);
  CHECK_THROWS(run(five, {}, {}), ShapeError);
  CHECK_THROWS(run(column, {}, {}), ShapeError);
  CHECK_THROWS(run(three, wrong, right), ShapeError);
  CHECK_THROWS(run(three, left, wrong), ShapeError);
  CHECK_THROWS(run(three, right, left), ShapeError);
  CHECK_THROWS(of_bidiagonal({1, 2, 3}, {1}, 1), ShapeError);
  CHECK_THROWS(of_bidiagonal({1, 2, 3}, {1, 2, 3}, 1), ShapeError);
  CHECK_THROWS(of_bidiagonal({1, 2, 3}, {1, 2}, 4), ShapeError);
  CHECK_THROWS(of_bidiagonal({1, 2, 3}, {1, 2}, -1), ShapeError);
  CHECK_THROWS(of_bidiagonal({}, {1}, 0), ShapeError);
  of_bidiagonal({}, {}, 0);
}

// A matrix that is not finite gives an error, or values that are not finite, but no plausible
// numbers.
void nonfinite_matrices_are_reported() {
  for (const Index n : {3, 40}) {
    for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
      Matrix<double> w = random_matrix<double>(n, n), values(1, 2);
      w(1, 2) = bad;
      values.setConstant(1.0);
      bool is_reported = false;
      try {
        singular_values<double>(MatrixRef<double>(w), values, {}, {}, Context{});
        is_reported = !values.allFinite();
      } catch (const std::exception&) {
        is_reported = true;
      }
      CHECK(is_reported);
    }
  }
}

void bidiagonal(const Values& a, const Values& b, double allowed) {
  const Index n = static_cast<Index>(a.size());
  Matrix<double> dense = Matrix<double>::Zero(n, n), wanted(1, n);
  for (Index i = 0; i < n; ++i) {
    dense(i, i) = a[static_cast<std::size_t>(i)];
    if (i + 1 < n) dense(i, i + 1) = b[static_cast<std::size_t>(i)];
  }
  singular_values<double>(MatrixRef<double>(dense), wanted, {}, {}, Context{});
  const double top = n > 0 ? wanted(0, 0) : 0.0;
  for (const Index k : {n, std::min<Index>(n, 4)}) {
    const Values values = of_bidiagonal(a, b, k);
    CHECK(static_cast<Index>(values.size()) == k);
    for (Index i = 0; i < k; ++i) {
      CHECK_NEAR(values[static_cast<std::size_t>(i)], wanted(0, i), allowed * top);
    }
  }
}

void bidiagonal_matrices() {
  for (const Index n : {1, 2, 3, 10, 50, 120}) {
    const std::size_t size = static_cast<std::size_t>(n);
    Values a(size), b(size - 1), ones(size, 1.0), zeros(size, 0.0), no_link(size - 1, 0.0);
    for (auto& x : a) x = check::uniform();
    for (auto& x : b) x = check::uniform();
    const double rounding = check::tolerance<double>(n);
    bidiagonal(a, b, rounding);
    bidiagonal(ones, no_link, rounding);
    bidiagonal(zeros, no_link, rounding);
    bidiagonal(ones, Values(size - 1, 1.0), rounding);
    bidiagonal(zeros, b, rounding);
    Values chi(size), half = a;
    for (std::size_t i = 0; i < size; ++i) chi[i] = std::sqrt(double(3 * size - i));
    bidiagonal(chi, b, rounding);
    for (std::size_t i = 0; i < size; i += 2) half[i] = 0.0;
    bidiagonal(half, b, rounding);
    for (const double scale : {1e-200, 1e-100, 1e100, 1e200}) {
      Values as = a, bs = b;
      for (auto& x : as) x *= scale;
      for (auto& x : bs) x *= scale;
      bidiagonal(as, bs, rounding);
    }
  }
  // Values far below the largest, which B^T B would lose.
  bidiagonal({1.0, 1e-9}, {1.0}, check::tolerance<double>(2));
  bidiagonal({1.0, 1e-5, 1.0, 1e-9}, {1.0, 1.0, 1.0}, check::tolerance<double>(4));
  CHECK_NEAR(of_bidiagonal({-3.0}, {}, 1)[0], 3.0, 1e-15);
  const double bad = std::numeric_limits<double>::infinity();
  CHECK_THROWS(of_bidiagonal({1.0, bad}, {1.0}, 1), std::domain_error);
  CHECK_THROWS(of_bidiagonal({1.0, 1.0}, {-bad}, 1), std::domain_error);
  CHECK_THROWS(of_bidiagonal({std::nan(""), 1.0}, {1.0}, 1), std::domain_error);
}

// A long decomposition polls its caller, and returns on abort.
void long_decomposition_polls() {
  Matrix<double> w = random_matrix<double>(700, 700), values(1, 700);
  int asked = 0;
  Monitor monitor([&](Index, double, bool) {
    ++asked;
    return Answer::go_on;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  singular_values<double>(MatrixRef<double>(w), values, {}, {}, Context{1, &monitor});
  CHECK(asked >= 1);
  CHECK_NEAR(values.squaredNorm(), w.squaredNorm(), 1e-9 * w.squaredNorm());
  Monitor aborting([](Index, double, bool) { return Answer::abort; });
  std::this_thread::sleep_for(std::chrono::milliseconds(60));
  const auto start = std::chrono::steady_clock::now();
  CHECK_THROWS(singular_values<double>(MatrixRef<double>(w), values, {}, {}, Context{1, &aborting}),
               Interrupted);
  w.setZero();  // the thread owns a copy of the data
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  CHECK(elapsed.count() < 2.0);
  // Wait for the abandoned thread before the program exits.
  std::this_thread::sleep_for(std::chrono::milliseconds(500));
}

}  // namespace

int main() {
  known_spectra_are_found<double>();
  known_spectra_are_found<float>();
  sizes_are_checked();
  nonfinite_matrices_are_reported();
  bidiagonal_matrices();
  long_decomposition_polls();
  return check::result();
}
