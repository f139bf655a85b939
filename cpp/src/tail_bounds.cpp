// SPDX-License-Identifier: MIT
#include "tail_bounds.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Returns || x (1 - y^T y) ||_F for the first j rows of y.
template <class T>
double norm_outside(const Matrix<T>& x, const Matrix<T>& y, Index j, const Context& context) {
  if (x.rows() == 0) return 0.0;
  Matrix<T> overlap(x.rows(), j);
  Matrix<T> complement = x;
  if (j > 0) {
    multiply<T>(view(x), Op::none, top(y, j), Op::transpose, MatrixRef<T>(overlap), context);
    multiply<T>(T(-1), MatrixRef<T>(overlap), Op::none, top(y, j), Op::none, T(1),
                MatrixRef<T>(complement), context);
  }
  return static_cast<double>(complement.norm()) + 8.0 * epsilon<T>();
}

}  // namespace

double perturbation(double gap, double eta) {
  if (eta == 0.0) return 0.0;
  return 2.0 * square(eta) / (gap + std::hypot(gap, 2.0 * eta));
}

template <class T>
void TailBounds<T>::certify(const Bound& tail, Index j) {
  const SingularPairs<T>& pairs = subspace_.measured();
  certified_.bound = tail;
  certified_.rank = j;
  safe_assign_both(certified_.left, pairs.left.topRows(j), certified_.right,
                   pairs.right.topRows(j));
  certified_.largest_value = pairs.values[0];
  certified_.residual = j > 0 ? subspace_.residual(0, j) : 0.0;
  certified_.is_for_current_pairs = true;
  drift_ = 0.0;
}

// Applies (2).
template <class T>
void TailBounds<T>::bound_by_norm(double squared_norm) {
  const Index p = subspace_.size();
  const std::vector<double>& s = subspace_.measured().values;
  const double total = squared_norm * (1.0 + 64.0 * epsilon<T>());
  double removed = 0.0;
  for (Index j = 0; j <= p; ++j) {
    const double m = std::sqrt(std::max(total - removed, 0.0));
    tails_[j].at_most(m + subspace_.rounding_bound(), Completeness::rigorous);
    // The pairs are orthonormal to rounding only: this is a lower bound on s_i^2 + |r_i|^2.
    if (j < p) {
      removed += (square(s[j]) + subspace_.squared_residual(j)) * (1.0 - 16.0 * epsilon<T>());
    }
  }
}

// Applies (3).
template <class T>
void TailBounds<T>::bound_by_certificate(const Context& context) {
  const Bound& bound = certified_.bound;
  const Index p = subspace_.size();
  if (bound.kind != Completeness::none && certified_.is_for_current_pairs) {
    tails_[certified_.rank].at_most(bound.value + subspace_.rounding_bound(), bound.kind);
  } else if (bound.kind != Completeness::none && std::isfinite(drift_)) {
    const double moved_tail = bound.value + drift_;
    if (certified_.rank < p) transfer(certified_.rank, moved_tail, context);
    transfer(p, moved_tail, context);
  }
}

// Applies (5) to the complement of the first j pairs.
template <class T>
void TailBounds<T>::transfer(Index j, double moved_tail, const Context& context) {
  const SingularPairs<T>& pairs = subspace_.measured();
  const double a = norm_outside(certified_.left, pairs.left, j, context);
  const double b = norm_outside(certified_.right, pairs.right, j, context);
  const double misalignment = a * b * certified_.largest_value + (a + b) * certified_.residual;
  tails_[j].at_most(moved_tail + misalignment + subspace_.rounding_bound(), certified_.bound.kind);
}

template <class T>
void TailBounds<T>::find_tails(double squared_norm, const Context& context) {
  const Index p = subspace_.size();
  const std::vector<double>& s = subspace_.measured().values;
  tails_.assign(static_cast<std::size_t>(p) + 1, Bound{});
  if (p == subspace_.shape().smaller)
    tails_[p].at_most(subspace_.rounding_bound(), Completeness::rigorous);
  if (squared_norm >= 0.0) bound_by_norm(squared_norm);
  bound_by_certificate(context);
  // A bound for j vectors also holds for more vectors, and with their values and residuals for
  // fewer.
  for (Index j = 1; j <= p; ++j) tails_[j].at_most(tails_[j - 1].value, tails_[j - 1].kind);
  const std::vector<Bound> direct = tails_;
  for (Index j = 0; j < p; ++j) {
    for (Index l = j + 1; l <= p; ++l) {
      const double bound = std::max(s[j], direct[l].value) + subspace_.residual(j, l);  // (4)
      tails_[j].at_most(bound, direct[l].kind);
    }
  }
}

template <class T>
void TailBounds<T>::find_errors(double squared_norm, TrackerRecord& record,
                                const Context& context) {
  find_tails(squared_norm, context);
  const Index k = subspace_.shape().k, p = subspace_.size();
  const std::vector<double>&s = subspace_.measured().values, &values = subspace_.reported().values;
  double largest = 0.0;
  Completeness kind = Completeness::rigorous;
  for (Index i = 0; i < k; ++i) {
    Bound upper;
    // A block that spans one side determines all singular values.
    if (p == subspace_.shape().smaller) upper.at_most(values[i], Completeness::rigorous);
    for (Index j = 0; j <= p; ++j) {
      const double eta = subspace_.residual(0, j);
      const double tail = tails_[j].value;
      const bool is_separated = i < j && s[i] > tail;
      const double bound = is_separated ? s[i] + perturbation(s[i] - tail, eta) : tail + eta;
      upper.at_most(bound, tails_[j].kind);
    }
    record.errors[i] = std::max(upper.value - values[i], 0.0) + subspace_.rounding_bound();
    largest = std::max(largest, record.errors[i]);
    kind = std::min(kind, upper.kind);
  }
  largest_error_ = largest;
  record.completeness = is_good_enough() ? kind : Completeness::none;
  record.tail = tails_[k].value + (k > 0 ? subspace_.residual(0, k) : 0.0);
}

template <class T>
double TailBounds<T>::vector_error(const Context& context) const {
  const Index k = subspace_.shape().k, p = subspace_.size();
  const double residual = subspace_.residual(0, k);
  const double separation = subspace_.measured().values[k - 1] - tails_[k].value - residual;
  if (!(separation > 0.0)) return nan;
  const double left_rotation = k < p ? subspace_.rotation().block(k, 0, p - k, k).norm() : 0.0;
  Matrix<T> reported = subspace_.reported().right.topRows(k);
  const double right_rotation = norm_outside(reported, subspace_.measured().right, k, context);
  return residual / separation + std::hypot(left_rotation, right_rotation);
}

template class TailBounds<float>;
template class TailBounds<double>;

}  // namespace dlnfast
