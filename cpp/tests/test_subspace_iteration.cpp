// SPDX-License-Identifier: MIT
#include "subspace_iteration.hpp"

#include <array>
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "dlnfast/errors.hpp"
#include "small_decomposition.hpp"
#include "spectra.hpp"

using namespace dlnfast;
using check::context;
using check::distance;
using check::random_matrix;

namespace {

void check_decomposition(const Matrix<double>& r) {
  const SmallDecomposition d(r, context);
  const Index q = std::min(r.rows(), r.cols());
  const double rounding = check::tolerance<double>(q, 16.0);
  CHECK(d.a.cols() == q && d.b.cols() == q);
  const Matrix<double> product = d.a * d.s.row(0).asDiagonal() * d.b.transpose();
  CHECK_NEAR(distance(product, r), 0.0, rounding * (1.0 + d.s(0, 0)));
  for (Index i = 1; i < q; ++i) CHECK(d.s(0, i) <= d.s(0, i - 1));
  CHECK_NEAR(check::departure_from_orthonormal<double>(d.a.transpose()), 0.0, rounding);
  CHECK_NEAR(check::departure_from_orthonormal<double>(d.b.transpose()), 0.0, rounding);
}

// Rotations and the general method, for nearly diagonal, singular, large and rectangular matrices.
void small_matrices_are_decomposed() {
  for (const Index p : {1, 2, 9, 40, 41}) {
    Matrix<double> r = random_matrix<double>(p, p);
    check_decomposition(r);
    check_decomposition(Matrix<double>(Matrix<double>::Identity(p, p) + 1e-6 * r));
    r.row(p - 1) = 2.0 * r.row(0);
    check_decomposition(r);
    check_decomposition(Matrix<double>::Zero(p, p));
  }
  check_decomposition(random_matrix<double>(7, 12));
  check_decomposition(random_matrix<double>(12, 7));
}

template <class T>
struct Fixture {
  Matrix<double> exact;
  Matrix<T> w;
  TrackerShape shape;
  Random random{1};
  SubspaceIteration<T> iteration;

  Fixture(const Matrix<double>& matrix, Index k, Index p)
      : exact(matrix),
        w(matrix.template cast<T>()),
        shape{w.rows(), w.cols(), std::min(w.rows(), w.cols()), k},
        iteration(shape, p, random) {}
  void sweep(Matrix<T>* image = nullptr) {
    iteration.sweep(MatrixOperator<T>(view(w)), image, context);
  }
};

// Equations (1) to (3) of the header.
template <class T>
void sweep_makes_pairs(Index m, Index n, Index p) {
  Fixture<T> f(check::matrix_with_values(m, n, check::geometric(std::min(m, n), 0.8)),
               std::min<Index>(p, 3), p);
  const double rounding = check::tolerance<T>(std::max(m, n), 16.0);
  const std::vector<double> sigma = check::spectrum(f.exact);
  CHECK(f.iteration.prepare(context));
  for (int round = 0; round < 3; ++round) {
    Matrix<T> image;
    f.sweep(&image);
    const SingularPairs<T>&a = f.iteration.measured(), &b = f.iteration.reported();
    for (const Matrix<T>* rows : {&a.left, &a.right, &b.left, &b.right}) {
      CHECK(rows->rows() == p);
      CHECK_NEAR(check::departure_from_orthonormal(*rows), 0.0, rounding);
    }
    const Matrix<double> u = a.left.template cast<double>(), x = a.right.template cast<double>();
    const Matrix<double> u2 = b.left.template cast<double>(), v = b.right.template cast<double>();
    CHECK_NEAR(distance(image, Matrix<double>(u * f.exact)), 0.0, rounding);
    for (Index i = 0; i < p; ++i) {
      const double s = a.values[i], s2 = b.values[i];
      CHECK_NEAR((x.row(i) * f.exact.transpose() - s * u.row(i)).norm(), 0.0, rounding);
      const double residual = (u.row(i) * f.exact - s * x.row(i)).norm();
      CHECK_NEAR(std::sqrt(f.iteration.squared_residual(i)), residual, rounding);
      CHECK_NEAR((u2.row(i) * f.exact - s2 * v.row(i)).norm(), 0.0, rounding);
      CHECK(s <= s2 + rounding && s2 <= sigma[i] + rounding);
    }
    CHECK(f.iteration.residual(0, p) >= f.iteration.residual(0, 1));
    const Matrix<double> rotated = f.iteration.rotation().transpose() * u;
    CHECK_NEAR(distance(rotated, u2), 0.0, rounding);
    CHECK(!f.iteration.prepare(context));
  }
}

// A single leading vector is separated; with guards, all vectors of a converged block are.
void separated_pairs_are_counted() {
  Fixture<double> f(check::matrix_with_values(30, 20, {3.0, 1.0, 1.0, 1e-3, 1e-4}), 3, 5);
  f.iteration.prepare(context);
  for (int round = 0; round < 3; ++round) f.sweep();
  CHECK(f.iteration.n_separated(0.05) == 3);
  CHECK(f.iteration.n_separated(10.0) == 0);
  Fixture<double> equal(check::matrix_with_values(30, 20, {3.0, 1.0, 1.0, 1.0, 1.0, 1.0}), 3, 5);
  equal.iteration.prepare(context);
  for (int round = 0; round < 3; ++round) equal.sweep();
  CHECK(equal.iteration.n_separated(0.05) == 1);
}

void seeds_start_the_iteration() {
  Fixture<double> f(check::matrix_with_values(40, 30, check::geometric(30, 0.9)), 3, 6);
  const Matrix<double> start = random_matrix<double>(2, 30);
  f.iteration.seed(view(start), context);
  CHECK(!f.iteration.prepare(context));
  // The seed is in the span of the block.
  const Matrix<double>& block = f.iteration.reported().right;
  CHECK_NEAR((start - start * block.transpose() * block).norm(), 0.0, 1e-12);
  CHECK_NEAR(check::departure_from_orthonormal(block), 0.0, 1e-13);
  CHECK_THROWS(f.iteration.seed(MatrixRef<const double>(start.data(), 2, 29), context), ShapeError);
  f.iteration.reset();
  CHECK(f.iteration.prepare(context));
}

// The next update starts exactly from a block that W maps into itself.
void invariant_block_is_reused() {
  Fixture<double> f(check::matrix_with_values(40, 30, {3.0, 2.0, 1.0}), 3, 3);
  f.iteration.prepare(context);
  for (int round = 0; round < 4; ++round) f.sweep();
  const Matrix<double> block = f.iteration.measured().right;
  f.iteration.reuse_invariant_block();
  f.iteration.prepare(context);
  CHECK(distance(f.iteration.reported().right, block) == 0.0);
}

// Guards are replaced by better vectors, also in a block that has grown.
void guards_are_replaced() {
  const Index n = 30;
  Fixture<double> f(check::matrix_with_values(40, n, check::geometric(n, 0.9)), 2, 4);
  f.iteration.prepare(context);
  for (int round = 0; round < 2; ++round) f.sweep();
  const Matrix<double> leading = f.iteration.reported().right.topRows(2);
  f.iteration.grow(7);
  CHECK(f.iteration.size() == 7);
  CHECK(f.iteration.reported().right.bottomRows(3).norm() == 0.0);
  CHECK(distance(f.iteration.rotation().bottomRightCorner(3, 3), Matrix<double>::Identity(3, 3)) ==
        0.0);
  const Matrix<double> candidates = check::random_orthonormal(3, n);
  f.iteration.plan_guards(2, candidates, context);
  CHECK(distance(f.iteration.reported().right.topRows(2), leading) == 0.0);
  f.iteration.prepare(context);
  const Matrix<double>& block = f.iteration.reported().right;
  CHECK(block.rows() == 7);
  CHECK_NEAR(check::departure_from_orthonormal(block), 0.0, 1e-13);
  for (const Matrix<double>* rows : {&leading, &candidates}) {
    CHECK_NEAR((*rows - *rows * block.transpose() * block).norm(), 0.0, 1e-12);
  }
  f.sweep();
  CHECK_NEAR(check::departure_from_orthonormal(f.iteration.reported().left), 0.0, 1e-13);
}

void nonfinite_matrices_are_rejected() {
  Fixture<double> f(random_matrix<double>(9, 8), 2, 3);
  f.iteration.prepare(context);
  f.w(1, 1) = std::numeric_limits<double>::infinity();
  CHECK_THROWS(f.sweep(), std::domain_error);
}

}  // namespace

int main() {
  small_matrices_are_decomposed();
  for (const auto& [m, n, p] : std::vector<std::array<Index, 3>>{
           {1, 1, 1}, {7, 3, 3}, {3, 7, 2}, {40, 60, 12}, {60, 50, 45}}) {
    sweep_makes_pairs<double>(m, n, p);
    sweep_makes_pairs<float>(m, n, p);
  }
  separated_pairs_are_counted();
  seeds_start_the_iteration();
  invariant_block_is_reused();
  guards_are_replaced();
  nonfinite_matrices_are_rejected();
  return check::result();
}
