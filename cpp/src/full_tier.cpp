// SPDX-License-Identifier: MIT
#include "full_tier.hpp"

#include <algorithm>

#include "dlnfast/safe_resize.hpp"
#include "dlnfast/singular_values.hpp"
#include "gram_decomposition.hpp"

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
  record.tier = Tier::full;
  record.completeness = Completeness::rigorous;
  if (settings_.follow) subspace_.allocate();
  const MatrixRef<const T> scaled = scale_.scaled(w);
  if (!decompose_gram(scaled, record, context)) decompose(scaled, record, context);
  scale_.release();
  if (shape.k == shape.smaller) find_shared_value(record);
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
  GramDecomposition gram;  // its copy of W is as large as W, so it does not outlive the update
  gram.compute<T>(w, p, k, tolerance, settings_.follow, context);
  SingularPairs<T>& pairs = subspace_.reported();
  std::copy(gram.values().begin(), gram.values().end(), pairs.values.begin());
  std::copy_n(gram.errors().begin(), k, record.errors.begin());
  // Smaller values have larger errors.
  set_tail(gram.errors()[k < p ? k : k - 1], record);
  subspace_.set_rounding_bound(pairs.values[0]);
  if (settings_.follow) {
    safe_assign_both(pairs.left, gram.left().template cast<T>(), pairs.right,
                     gram.right().template cast<T>());
    record.vector_error = gram.angle_error(k);
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
  set_tail(subspace_.rounding_bound(), record);
  if (settings_.follow) {
    safe_assign_both(pairs.left, left.transpose(), pairs.right, right.transpose());
    record.vector_error = 0.0;
  }
}

// Bounds every value that is not reported by the next one, which has this error.
template <class T>
void FullTier<T>::set_tail(double error, TrackerRecord& record) const {
  const std::vector<double>& s = subspace_.reported().values;
  const Index k = subspace_.shape().k, p = subspace_.size();
  record.tail = (k < p ? s[k] : (p == subspace_.shape().smaller ? 0.0 : s[k - 1])) + error;
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
