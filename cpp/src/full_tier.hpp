// SPDX-License-Identifier: MIT
// The full tier of a tracker: a decomposition of all of W, for small matrices or many values, where it costs
// no more than a few sweeps. Two methods:
//
//   Gram matrices  a few values and vectors, to 1e-10 ||W||, or 2e-6 ||W|| in single precision
//                  (gram_decomposition.hpp)
//   SVD            most values, to rounding errors, and mode "full"
#pragma once

#include "dlnfast/svd_tracker.hpp"
#include "subspace_iteration.hpp"
#include "tracker_scale.hpp"

namespace dlnfast {

template <class T>
class FullTier {
 public:
  // `subspace` and `scale` must outlive the tier.
  FullTier(const TrackerSettings& settings, SubspaceIteration<T>& subspace, TrackerScale<T>& scale)
      : settings_(settings), subspace_(subspace), scale_(scale) {}

  // Whether matrices of this shape, with blocks of p vectors, use this tier.
  static bool is_chosen(TrackerMode mode, Index smaller, Index p);

  // Replaces the reported pairs by those of W, and fills the record's errors.
  void update(MatrixRef<const T> w, TrackerRecord& record, const Context& context);

 private:
  bool decompose_gram(MatrixRef<const T> w, TrackerRecord& record, const Context& context);
  void decompose(MatrixRef<const T> w, TrackerRecord& record, const Context& context);
  void set_tail(double error, TrackerRecord& record) const;
  void find_shared_value(TrackerRecord& record) const;

  TrackerSettings settings_;
  SubspaceIteration<T>& subspace_;
  TrackerScale<T>& scale_;
};

extern template class FullTier<float>;
extern template class FullTier<double>;

}  // namespace dlnfast
