// SPDX-License-Identifier: MIT
#include "dlnfast/basis.hpp"

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <vector>

#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "numbers.hpp"

namespace dlnfast {

template <class T>
void project_out(MatrixRef<T> block, MatrixRef<const T> basis, const Context& context) {
  if (basis.rows == 0 || block.rows == 0) return;
  Matrix<T> overlaps(block.rows, basis.rows);
  for (int pass = 0; pass < 2; ++pass) {
    multiply<T>(block, Op::none, basis, Op::transpose, MatrixRef<T>(overlaps), context);
    multiply<T>(T(-1), MatrixRef<T>(overlaps), Op::none, basis, Op::none, T(1), block, context);
  }
}

template void project_out<float>(MatrixRef<float>, MatrixRef<const float>, const Context&);
template void project_out<double>(MatrixRef<double>, MatrixRef<const double>, const Context&);

template <class T>
Index extend_basis(MatrixRef<T> basis, Index n_basis, MatrixRef<T> block, double tolerance,
                   ArrayRef<double, 1> lengths, const Context& context) {
  require_shape(basis, basis.rows, block.cols, "the basis");
  const Index max_added = std::min(block.rows, block.cols);
  if (n_basis < 0 || n_basis > basis.rows - max_added) {
    throw ShapeError("the basis has " + std::to_string(basis.rows) + " rows; wanted " +
                     std::to_string(n_basis) + " + " + std::to_string(max_added));
  }
  const auto filled = [&](Index n) { return basis.block(0, 0, n, basis.cols); };
  require_room(lengths, max_added, {}, "lengths");
  project_out<T>(block, filled(n_basis), context);

  auto remaining = block.map();
  Index added = 0;
  while (added < max_added && n_basis + added < block.cols) {
    context.poll();
    Index longest = 0;
    double length = -1.0;
    for (Index i = 0; i < block.rows; ++i) {
      const double l = static_cast<double>(remaining.row(i).norm());
      if (l > length) {
        length = l;
        longest = i;
      }
    }
    if (!(length > tolerance)) break;
    const Index n = n_basis + added;
    MatrixRef<T> new_row = basis.block(n, 0, 1, basis.cols);
    new_row.map() = remaining.row(longest) / static_cast<T>(length);
    project_out<T>(new_row, filled(n), context);
    new_row.map() /= new_row.map().norm();
    remaining.row(longest).setZero();
    for (Index i = 0; i < block.rows; ++i) {
      remaining.row(i) -= remaining.row(i).dot(new_row.map().row(0)) * new_row.map().row(0);
    }
    lengths.data[added++] = length;
  }
  return added;
}

namespace {

// Replaces the rows by L^{-1} rows, where L L^T is their Gram matrix. Returns the smallest diagonal
// entry of L, which is 1 for orthogonal rows. Returns 0, with unchanged rows, if they are so close
// to dependent that a second pass would not make them orthonormal.
template <class T>
double whiten_rows(MatrixRef<T> block, Matrix<T>& scratch, const Context& context) {
  constexpr double least_pivot = 0.05;
  const Index k = block.rows;
  Matrix<T> gram(k, k);
  multiply<T>(block, Op::none, block, Op::transpose, MatrixRef<T>(gram), context);
  const Eigen::LLT<Eigen::MatrixXd> factor(gram.template cast<double>());
  if (factor.info() != Eigen::Success) return 0.0;
  const double pivot = factor.matrixLLT().diagonal().minCoeff();
  if (!(pivot > least_pivot)) return 0.0;
  const Matrix<T> inverse =
      factor.matrixL().solve(Eigen::MatrixXd::Identity(k, k)).template cast<T>();
  scratch = block.map();
  multiply<T>(MatrixRef<const T>{inverse.data(), k, k}, Op::none,
              MatrixRef<const T>{scratch.data(), k, block.cols}, Op::none, block, context);
  return pivot;
}

}  // namespace

template <class T>
Index orthonormalize(MatrixRef<T> block, Random& random, const Context& context) {
  const Index k = block.rows;
  if (k > block.cols) {
    throw ShapeError("a block has " + std::to_string(k) + " rows of length " +
                     std::to_string(block.cols) + ", which cannot be orthonormal");
  }
  if (k == 0) return 0;
  bool any_zero = false;
  for (Index i = 0; i < k; ++i) {
    auto row = block.map().row(i);
    // Scale by the largest entry first, because squares of very small numbers underflow.
    const T largest = row.cwiseAbs().maxCoeff();
    if (largest == T(0)) {
      any_zero = true;
      continue;
    }
    row /= largest;
    row /= row.norm();
  }
  Matrix<T> scratch;
  if (!any_zero) {
    // The rounding errors grow by the inverse square of the pivot: nearly orthogonal rows need no
    // second pass.
    constexpr double nearly_orthogonal = 0.7;
    const double pivot = whiten_rows<T>(block, scratch, context);
    if (pivot > nearly_orthogonal) return k;
    if (pivot > 0.0 && whiten_rows<T>(block, scratch, context) > 0.0) return k;
  }

  scratch = block.map();
  std::vector<double> lengths(static_cast<std::size_t>(k));
  const double tolerance = 16.0 * epsilon<T>() * std::sqrt(static_cast<double>(k));
  const Index rank =
      extend_basis<T>(block, 0, MatrixRef<T>(scratch), tolerance, as_array(lengths), context);
  for (Index n = rank; n < k;) {
    Matrix<T> new_rows(k - n, block.cols);
    random.fill(MatrixRef<T>(new_rows));
    n += extend_basis<T>(block, n, MatrixRef<T>(new_rows), 1e-3, as_array(lengths), context);
  }
  return rank;
}

template Index orthonormalize<float>(MatrixRef<float>, Random&, const Context&);
template Index orthonormalize<double>(MatrixRef<double>, Random&, const Context&);

template Index extend_basis<float>(MatrixRef<float>, Index, MatrixRef<float>, double,
                                   ArrayRef<double, 1>, const Context&);
template Index extend_basis<double>(MatrixRef<double>, Index, MatrixRef<double>, double,
                                    ArrayRef<double, 1>, const Context&);

}  // namespace dlnfast
