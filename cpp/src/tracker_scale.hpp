// SPDX-License-Identifier: MIT
// The unit of a tracker: a power of two by which W is multiplied, so that its size is near 1.
//
//   factor * ||W|| in [2^-24, 2^24]
//
// The factor stays the same from update to update while this holds, because the bounds of earlier
// updates are in its unit.
#pragma once

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "scaled_operator.hpp"

namespace dlnfast {

template <class T>
class TrackerScale {
 public:
  double factor() const { return factor_; }

  // Chooses the factor from `norm`, ||W||_F; returns whether it changed. Without `is_exact`, the
  // norm of an operator may be NaN, or 0 because its square underflowed. Then the size is that of
  // the product with a random vector, and `norm` becomes NaN unless that product is 0. Throws
  // std::domain_error if the product is not finite.
  bool choose(const LinearOperator<T>& w, double& norm, bool is_exact, Random& random,
              const Context& context);

  // W in this unit: an operator, without a copy of W, or a matrix. The matrix is copied unless the
  // factor is 1, and is valid until `release`.
  ScaledOperator<T> scaled(const LinearOperator<T>& w) {
    return ScaledOperator<T>(w, factor_, scratch_);
  }
  MatrixRef<const T> scaled(MatrixRef<const T> w);
  void release() { scratch_.resize(0, 0); }

  // Converts a record from this unit to that of W.
  void convert(TrackerRecord& record) const;

 private:
  double factor_ = 1.0;
  Matrix<T> scratch_;  // scaled vectors, or the scaled W
};

extern template class TrackerScale<float>;
extern template class TrackerScale<double>;

}  // namespace dlnfast
