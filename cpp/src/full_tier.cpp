// SPDX-License-Identifier: MIT
#include "full_tier.hpp"

#include "dlnfast/safe_resize.hpp"
#include "dlnfast/singular_values.hpp"

namespace dlnfast {
namespace {

// Matrices whose smaller side is at most this always use the full tier.
constexpr Index full_size = 128;

}  // namespace

template <class T>
bool FullTier<T>::is_chosen(TrackerMode mode, Index smaller, Index p) {
  return mode == TrackerMode::full ||
         (mode == TrackerMode::automatic && (smaller <= full_size || 3 * p >= smaller));
}

template <class T>
void FullTier<T>::update(MatrixRef<const T> w, TrackerRecord& record, const Context& context) {
  const TrackerShape& shape = subspace_.shape();
  const Index k = shape.k, p = subspace_.size();
  record.tier = Tier::full;
  const Index n_vectors = settings_.follow ? p : 0;
  Matrix<T> values(1, p);
  Matrix<T> left(settings_.follow ? shape.m : 0, n_vectors),
      right(settings_.follow ? shape.n : 0, n_vectors);
  singular_values<T>(scale_.scaled(w), MatrixRef<T>(values), MatrixRef<T>(left),
                     MatrixRef<T>(right), context);
  scale_.release();
  SingularPairs<T>& pairs = subspace_.reported();
  const std::vector<double>& s = pairs.values;
  for (Index i = 0; i < p; ++i) pairs.values[i] = static_cast<double>(values(0, i));
  subspace_.set_rounding_bound(s[0]);
  const double rounding_bound = subspace_.rounding_bound();
  for (Index i = 0; i < k; ++i) record.errors[i] = rounding_bound;
  record.completeness = Completeness::rigorous;
  record.tail = (k < p ? s[k] : (p == shape.smaller ? 0.0 : s[k - 1])) + rounding_bound;
  if (k == shape.smaller) find_shared_value(record);
  if (settings_.follow) {
    subspace_.allocate();
    safe_assign_both(pairs.left, left.transpose(), pairs.right, right.transpose());
    record.vector_error = 0.0;
    subspace_.start_from_reported();
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
