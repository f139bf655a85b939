// SPDX-License-Identifier: MIT
#include "full_tier.hpp"

#include <algorithm>

#include "dlnfast/safe_resize.hpp"
#include "dlnfast/singular_values.hpp"

namespace dlnfast {
namespace {

// Errors, relative to the largest value, up to which Gram matrices are not refined further. What float
// weights lose by rounding is of this size.
constexpr double double_tolerance = 1e-10;
constexpr double float_tolerance = 2e-6;

}  // namespace

template <class T>
bool FullTier<T>::is_chosen(TrackerMode mode, Index smaller, Index p) {
  return mode == TrackerMode::full ||
         (mode == TrackerMode::automatic && (smaller <= largest_full_size || 3 * p >= smaller));
}

template <class T>
void FullTier<T>::update(MatrixRef<const T> w, TrackerRecord& record, const Context& context) {
  const TrackerShape& shape = subspace_.shape();
  const Index k = shape.k, p = subspace_.size();
  record.tier = Tier::full;
  record.completeness = Completeness::rigorous;
  if (settings_.follow) subspace_.allocate();
  const MatrixRef<const T> scaled = scale_.scaled(w);
  if (!decompose_gram(scaled, record, context)) decompose(scaled, record, context);
  scale_.release();
  const std::vector<double>& s = subspace_.reported().values;
  const double error = record.errors[k - 1];
  record.tail = (k < p ? s[k] : (p == shape.smaller ? 0.0 : s[k - 1])) + error;
  if (k == shape.smaller) find_shared_value(record);
  if (settings_.follow) subspace_.start_from_reported();
}

// Returns false where an SVD is cheaper, because most values are wanted to all digits.
template <class T>
bool FullTier<T>::decompose_gram(MatrixRef<const T> w, TrackerRecord& record,
                                 const Context& context) {
  const Index k = subspace_.shape().k, p = subspace_.size();
  const bool is_double = sizeof(T) == sizeof(double);
  if (settings_.mode == TrackerMode::full || (is_double && 3 * p >= subspace_.shape().smaller)) {
    return false;
  }
  const double tolerance = is_double ? double_tolerance : float_tolerance;
  gram_.compute<T>(w, p, k, tolerance, settings_.follow, context);
  SingularPairs<T>& pairs = subspace_.reported();
  std::copy(gram_.values().begin(), gram_.values().end(), pairs.values.begin());
  std::copy_n(gram_.errors().begin(), k, record.errors.begin());
  subspace_.set_rounding_bound(pairs.values[0]);
  if (settings_.follow) {
    pairs.left = gram_.left().template cast<T>();
    pairs.right = gram_.right().template cast<T>();
    record.vector_error = gram_.angle_error(k);
  }
  return true;
}

// The SVD.
template <class T>
void FullTier<T>::decompose(MatrixRef<const T> w, TrackerRecord& record, const Context& context) {
  const TrackerShape& shape = subspace_.shape();
  const Index p = subspace_.size();
  const Index n_vectors = settings_.follow ? p : 0;
  Matrix<T> values(1, p);
  Matrix<T> left(settings_.follow ? shape.m : 0, n_vectors),
      right(settings_.follow ? shape.n : 0, n_vectors);
  singular_values<T>(w, MatrixRef<T>(values), MatrixRef<T>(left), MatrixRef<T>(right), context);
  SingularPairs<T>& pairs = subspace_.reported();
  for (Index i = 0; i < p; ++i) pairs.values[i] = static_cast<double>(values(0, i));
  subspace_.set_rounding_bound(pairs.values[0]);
  for (Index i = 0; i < shape.k; ++i) record.errors[i] = subspace_.rounding_bound();
  if (settings_.follow) {
    safe_assign_both(pairs.left, left.transpose(), pairs.right, right.transpose());
    record.vector_error = 0.0;
  }
}

// Sets rho to the middle of the longest run of equal values.
template <class T>
void FullTier<T>::find_shared_value(TrackerRecord& record) const {
  const std::vector<double>& s = subspace_.reported().values;
  const Index k = subspace_.shape().k;
  Index best = 0, size = 0;
  for (Index begin = 0; begin < k;) {
    Index end = begin + 1;
    while (end < k && s[end - 1] - s[end] <= settings_.branches.cluster_tolerance * s[0]) ++end;
    if (end - begin > size) {
      best = begin;
      size = end - begin;
    }
    begin = end;
  }
  if (size < 2) return;
  record.rho = 0.5 * (s[best] + s[best + size - 1]);
  record.rho_spread = s[best] - s[best + size - 1];
  record.multiplicity = size;
}

template class FullTier<float>;
template class FullTier<double>;

}  // namespace dlnfast
