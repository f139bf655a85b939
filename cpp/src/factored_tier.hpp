// SPDX-License-Identifier: MIT
// The factored tier of a tracker: follows a matrix in factored form, without reading it.
//
// With the frames U (a x m), V (b x n) and the core K of low_rank_drift.hpp, and W_0 = eps times an
// isometry up to `departure`,
//
//   K = A diag(s) B^T:   s are singular values of W, with the vectors A^T U and B^T V,          (1)
//   |s| eps is the value of all min(m, n) - min(a, b) other directions,                         (2)
//   |sigma_i - values_i| <= truncated + |s| eps departure + rounding.                           (3)
//
// In (2) and (3), s is the factor of W_0 in W. Vectors are stored in the coordinates of the frames,
// which only grow. The vectors of (2) are stored in coordinates of directions of the complement of
// the frames, which stay the same as long as the frames do. Full vectors are computed only when
// they are read.
#pragma once

#include <vector>

#include "dlnfast/low_rank_drift.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "subspace_iteration.hpp"

namespace dlnfast {

template <class T>
class FactoredTier {
 public:
  // `subspace` and `random` must outlive the tier.
  FactoredTier(const TrackerSettings& settings, SubspaceIteration<T>& subspace, Random& random)
      : settings_(settings), subspace_(subspace), random_(random) {}

  // Throws std::invalid_argument or ShapeError if the frames are not closed or too large.
  static void check(const LowRankDrift<T>& drift);
  // Returns ||W||_F^2.
  static double squared_norm(const LowRankDrift<T>& drift, const Matrix<double>& core,
                             Index smaller);

  // Replaces the reported values by those of the core, and fills the record. Returns whether the
  // vectors are followed; then `drift` must not change until `deactivate` or the next update.
  bool update(const LowRankDrift<T>& drift, const Matrix<double>& core, TrackerRecord& record,
              const Context& context);
  // Coordinates of the reported vectors (rows); the caller may rotate and flip them.
  MatrixRef<double> left() { return coordinates_left_; }
  MatrixRef<double> right() { return coordinates_right_; }

  // Computes the reported vectors at full length, unless they are up to date.
  void compute_vectors(const Context& context);
  // Whether the reported vectors belong to a factored form.
  bool is_active() const { return drift_ != nullptr; }
  void deactivate() { drift_ = nullptr; }

 private:
  // A singular value of the core (index >= 0), or of direction -1 - index of the complement.
  struct Entry {
    double value;
    Index index;
  };

  std::vector<Entry> sorted_entries(const Matrix<double>& core, double rho, Index n_complement,
                                    const Context& context);
  void set_coordinates(const std::vector<Entry>& entries, double sign);
  void compute_complement(const Context& context);
  void combine(const Matrix<double>& coordinates, MatrixRef<const T> frame,
               const Matrix<T>& complement, Matrix<T>& vectors, const Context& context) const;

  TrackerSettings settings_;
  SubspaceIteration<T>& subspace_;
  Random& random_;
  const LowRankDrift<T>* drift_ = nullptr;
  Matrix<double> core_left_, core_right_;  // A^T, B^T
  Matrix<double> coordinates_left_, coordinates_right_;
  bool has_vectors_ = true;                       // at full length
  Matrix<T> complement_left_, complement_right_;  // orthonormal directions outside the frames
  Index complement_frame_ = -1;                   // size of the corresponding frames
  bool has_complement_ = false;
};

extern template class FactoredTier<float>;
extern template class FactoredTier<double>;

}  // namespace dlnfast
