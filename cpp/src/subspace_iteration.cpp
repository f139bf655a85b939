// SPDX-License-Identifier: MIT
#include "subspace_iteration.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "dlnfast/basis.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "numbers.hpp"
#include "small_decomposition.hpp"
#include "symmetric_eigen.hpp"
#include "views.hpp"

namespace dlnfast {

template <class T>
SubspaceIteration<T>::SubspaceIteration(const TrackerShape& shape, Index p, Random& random)
    : shape_(shape), p_(p), random_(random) {
  reported_.values.assign(static_cast<std::size_t>(p_), 0.0);
}

template <class T>
void SubspaceIteration<T>::set_rounding_bound(double largest_value) {
  rounding_bound_ = 16.0 * epsilon<T>() *
                        std::sqrt(static_cast<double>(std::max(shape_.m, shape_.n))) *
                        largest_value +
                    64.0 * std::numeric_limits<double>::min();
}

template <class T>
Index SubspaceIteration<T>::n_separated(double tolerance) const {
  const std::vector<double>& s = measured_.values;
  const Index largest = std::min(shape_.k, p_ - 1);
  for (Index j = largest; j > 0; --j) {
    const double gap = s[j - 1] - s[j];
    if (gap > 0.4 * tolerance * s[j - 1] && residual(0, j) < 0.25 * gap + rounding_bound_) return j;
  }
  return 0;
}

template <class T>
void SubspaceIteration<T>::allocate() {
  if (reported_.right.rows() == p_) return;
  safe_resize(measured_.left, p_, shape_.m);
  safe_resize(measured_.right, p_, shape_.n);
  safe_resize(reported_.left, p_, shape_.m);
  safe_resize(scratch_, 1, p_ * std::max(shape_.m, shape_.n));
  reported_.values.resize(static_cast<std::size_t>(p_), 0.0);
  residual_.assign(static_cast<std::size_t>(p_), 0.0);
  // Resize this one last: its size shows that all others are allocated.
  safe_resize(reported_.right, p_, shape_.n);
}

template <class T>
void SubspaceIteration<T>::grow(Index p) {
  const Index old = p_;
  p_ = p;
  for (Matrix<T>* block : {&measured_.left, &reported_.left, &measured_.right, &reported_.right}) {
    if (block->rows() == 0) continue;
    block->conservativeResize(p_, Eigen::NoChange);
    block->bottomRows(p_ - old).setZero();
  }
  // The old vectors have no components along the new ones.
  rotation_.conservativeResizeLike(Matrix<double>::Identity(p_, p_));
  rotation_.bottomRows(p_ - old).leftCols(old).setZero();
  rotation_.topRows(old).rightCols(p_ - old).setZero();
  safe_resize(scratch_, 1, p_ * std::max(shape_.m, shape_.n));
  for (auto* list : {&reported_.values, &measured_.values, &residual_}) {
    list->resize(static_cast<std::size_t>(p_), 0.0);
  }
}

template <class T>
void SubspaceIteration<T>::seed(MatrixRef<const T> right, const Context& context) {
  require_shape(right, right.rows, shape_.n, "the seed");
  allocate();
  const Index k = std::min(right.rows, p_);
  reported_.right.topRows(k) = right.map().topRows(k);
  random_.fill(MatrixRef<T>(reported_.right).block(k, 0, p_ - k, shape_.n));
  orthonormalize<T>(reported_.right, random_, context);
  has_start_ = true;
}

template <class T>
bool SubspaceIteration<T>::prepare(const Context& context) {
  allocate();
  const bool is_random = !has_start_;
  if (is_random) {
    random_.fill(MatrixRef<T>(reported_.right));
    orthonormalize<T>(reported_.right, random_, context);
    has_start_ = true;
  } else if (planned_.rows() == p_) {
    safe_assign(reported_.right, planned_);
    planned_.resize(0, 0);
  }
  return is_random;
}

template <class T>
void SubspaceIteration<T>::reset() {
  has_start_ = false;
  planned_.resize(0, 0);
  reported_.right.resize(0, 0);
}

// For y = x W^T: transforms x and y such that W x_i = s_i y_i, y orthonormal.
template <class T>
void SubspaceIteration<T>::diagonalize(Matrix<T>& x, Matrix<T>& y, std::vector<double>& values,
                                       const Context& context) {
  const Index p = y.rows();
  MatrixRef<T> product(scratch_.data(), p, y.cols());
  product.map() = y;
  orthonormalize<T>(y, random_, context);
  Matrix<T> r(p, p);
  multiply<T>(product, Op::none, MatrixRef<T>(y), Op::transpose, MatrixRef<T>(r), context);
  if (!r.allFinite()) throw std::domain_error("products with the tracked matrix are not finite");
  const SmallDecomposition d(r.template cast<double>(), context);
  rotate(y, d.b, context);
  rotate(x, d.a, context);
  safe_assign(rotation_, d.a);
  for (Index i = 0; i < p; ++i) values[i] = d.s(0, i);
}

// x <- a^T x.
template <class T>
void SubspaceIteration<T>::rotate(Matrix<T>& x, const Matrix<double>& a, const Context& context) {
  const Matrix<T> rotation = a.template cast<T>();
  MatrixRef<T> old(scratch_.data(), x.rows(), x.cols());
  old.map() = x;
  multiply<T>(view(rotation), Op::transpose, old, Op::none, MatrixRef<T>(x), context);
}

template <class T>
void SubspaceIteration<T>::sweep(const LinearOperator<T>& w, Matrix<T>* image,
                                 const Context& context) {
  Matrix<T>&x = measured_.right, &u = measured_.left, &product = reported_.right;
  x.swap(reported_.right);
  w.apply(MatrixRef<T>(x), MatrixRef<T>(u), context);
  measured_.values.resize(static_cast<std::size_t>(p_));
  diagonalize(x, u, measured_.values, context);  // (1)
  w.apply_transpose(MatrixRef<T>(u), MatrixRef<T>(product), context);
  if (image != nullptr) safe_assign(*image, product);
  for (Index i = 0; i < p_; ++i) {  // (2)
    const T value = static_cast<T>(measured_.values[i]);
    residual_[i] = square(static_cast<double>((product.row(i) - value * x.row(i)).norm()));
  }
  safe_assign(reported_.left, u);
  diagonalize(reported_.left, reported_.right, reported_.values, context);  // (3)
  set_rounding_bound(reported_.values[0]);
}

template <class T>
void SubspaceIteration<T>::accelerate(const LinearOperator<T>& w, Index steps,
                                      const Context& context) {
  const Index n_blocks = std::min(steps + 1, shape_.smaller / p_);
  const Index size = n_blocks * p_;
  Matrix<T> basis(size, shape_.n), images(size, shape_.m);
  const auto rows = [p = p_](Matrix<T>& m, Index i) {
    return MatrixRef<T>(m).block(i * p, 0, p, m.cols());
  };
  basis.topRows(p_) = reported_.right;
  for (Index i = 0;; ++i) {
    w.apply(rows(basis, i), rows(images, i), context);
    if (i + 1 == n_blocks) break;
    const MatrixRef<T> next = rows(basis, i + 1);
    w.apply_transpose(rows(images, i), next, context);
    for (int pass = 0; pass < 2; ++pass) {
      project_out<T>(next, top(basis, (i + 1) * p_), context);
      orthonormalize<T>(next, random_, context);
    }
  }
  Matrix<T> products(size, size);
  multiply<T>(view(images), Op::none, view(images), Op::transpose, MatrixRef<T>(products), context);
  if (!products.allFinite()) {
    throw std::domain_error("products with the tracked matrix are not finite");
  }
  Matrix<double> gram = products.template cast<double>();
  SymmetricEigen eigen;
  eigen.find_values(gram, p_);
  eigen.find_vectors(gram, random_);
  const Matrix<T> coefficients = eigen.vectors().template cast<T>();
  multiply<T>(view(coefficients), Op::none, view(basis), Op::none, MatrixRef<T>(reported_.right),
              context);
  orthonormalize<T>(reported_.right, random_, context);
}

template <class T>
void SubspaceIteration<T>::combine(Index j, const Matrix<T>& candidates, Matrix<T>& block,
                                   const Context& context) {
  const Matrix<T>& right = reported_.right;
  Matrix<T> basis(2 * p_ + candidates.rows(), shape_.n);
  std::vector<double> lengths(static_cast<std::size_t>(p_ + candidates.rows()));
  basis.topRows(j) = right.topRows(j);
  Index n = j;
  for (Matrix<T> added : {Matrix<T>(candidates), Matrix<T>(right.bottomRows(p_ - j))}) {
    if (n >= p_) break;
    n += extend_basis<T>(MatrixRef<T>(basis), n, added, 1e-3, as_array(lengths), context);
  }
  const Index n_filled = std::min(n, p_);
  safe_resize(block, p_, shape_.n);
  block.topRows(n_filled) = basis.topRows(n_filled);
  if (n_filled < p_) random_.fill(MatrixRef<T>(block).block(n_filled, 0, p_ - n_filled, shape_.n));
  orthonormalize<T>(block, random_, context);
}

template <class T>
void SubspaceIteration<T>::replace_guards(Index j, const Matrix<T>& candidates,
                                          const Context& context) {
  combine(j, candidates, reported_.right, context);
}

template <class T>
void SubspaceIteration<T>::plan_guards(Index j, const Matrix<T>& candidates,
                                       const Context& context) {
  combine(j, candidates, planned_, context);
}

template <class T>
void SubspaceIteration<T>::reuse_invariant_block() {
  if (planned_.rows() == p_) return;
  if (residual(0, p_) <= 1e-8 * reported_.values[0] + 4.0 * rounding_bound_) {
    safe_assign(planned_, measured_.right);
  }
}

template class SubspaceIteration<float>;
template class SubspaceIteration<double>;

}  // namespace dlnfast
