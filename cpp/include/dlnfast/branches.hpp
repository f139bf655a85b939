// SPDX-License-Identifier: MIT
// Identity of singular values from record to record: clusters, branches, signs and reference
// angles.
//
// Sorted order does not identify a singular value, because values cross. A branch is a singular
// value with its pair of vectors, followed by the overlaps with the pairs of the previous record,
//
//   o_ij = |<u_i, u'_j>| |<v_i, v'_j>|.
//
// An overlap above one half determines the partner uniquely. The other pairs are assigned so that
// the sum of their overlaps is largest (Kuhn's method). Vectors are rows.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/reflection.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

struct BranchSettings {
  double cluster_tolerance = 1e-8;  // relative to the largest value: closer values count as equal
  bool signed_values = false;       // follow values through zero
  DLNFAST_FIELDS("BranchSettings", cluster_tolerance, signed_values)
};

// Angles between two subspaces: the largest principal angle (radians), and the Frobenius norm of
// the sines.
struct BlockAngle {
  double largest;
  double frobenius;
};

// Returns the cluster index of each of the descending values. Neighbours belong to one cluster if
// they differ by at most four times their errors, or by `tolerance` times the largest value.
std::vector<std::int64_t> find_clusters(const std::vector<double>& values,
                                        const std::vector<double>& errors, double tolerance);

// Returns the column of each row in the assignment with the largest sum; -1 for a row without a
// column (more rows than columns). `gain` is row-major, n_rows x n_cols, nonnegative. O(n^3).
std::vector<Index> best_assignment(MatrixRef<const double> gain);

// Follows the branches of up to p singular values. Memory: four blocks of the vectors' size.
template <class T>
class Branches {
 public:
  explicit Branches(const BranchSettings& settings);
  ~Branches();

  // Assigns branches by comparison with the previous record, and stores the vectors for the next
  // one. Rotates u and v of values that are equal to rounding by one common rotation, towards the
  // previous vectors. Then flips the pairs so that they do not change sign: u and v together, or,
  // with signed_values, each on its own. The sign of a value whose u and v no longer agree is then
  // -1: its analytic branch passed through zero. An overlap below one half does not match two
  // values whose distance exceeds `max_distance`.
  void follow(const std::vector<double>& values, const std::vector<double>& errors,
              double max_distance, MatrixRef<T> left, MatrixRef<T> right, const Context& context);

  // Continues the branches of `other`, which followed them in other coordinates. `left` and `right`
  // are the vectors of its last record.
  void continue_from(const Branches<double>& other, MatrixRef<const T> left,
                     MatrixRef<const T> right);

  // Branch numbers of the last record, in the order of its values. A new branch gets the next free
  // number.
  const std::vector<std::int64_t>& ids() const { return ids_; }
  const std::vector<std::int64_t>& clusters() const { return clusters_; }
  const std::vector<double>& signs() const { return signs_; }  // 1, or -1 with signed_values
  // Overlap of each vector pair with its partner in the previous record; 1 in the first record.
  const std::vector<double>& overlaps() const { return overlaps_; }
  std::int64_t n_branches() const { return next_id_; }
  const std::vector<double>& values() const { return values_; }

  // Sets the reference of the angles: the vectors of the last record, or the vectors passed.
  void set_reference();
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right);
  bool has_reference() const { return has_reference_; }

  // Angles in radians between the vectors of the last record and those of the reference. Pairs
  // vectors of the same branch, or of the same index where the caller passed the reference; NaN
  // without a partner.
  std::vector<double> angles(bool left) const;
  // Angles between the spans of the first k vectors.
  BlockAngle block_angle(bool left, Index k, const Context& context) const;

 private:
  void align_groups(const std::vector<double>& values, MatrixRef<T> left, MatrixRef<T> right,
                    Matrix<T>& left_overlap, Matrix<T>& right_overlap, const Context& context);
  void match(const std::vector<double>& values, double max_distance, const Matrix<T>& left_overlap,
             const Matrix<T>& right_overlap);

  BranchSettings settings_;
  Matrix<T> left_, right_;  // vectors of the last record
  Matrix<T> reference_left_, reference_right_;
  std::vector<double> values_;
  std::vector<std::int64_t> ids_, clusters_, reference_ids_;
  std::vector<double> signs_, overlaps_;
  std::vector<Index> partner_;
  std::int64_t next_id_ = 0;
  bool has_reference_ = false;
  bool has_external_reference_ = false;
};

// Follows the pairs of n records: `values` (n x p) are known to `error`, and the vectors, left (n x p x a) and
// right (n x p x b), are rotated and flipped in place. Writes branches (`ids`) and clusters (n x p).
void follow_branches(ArrayRef<const double, 2> values, ArrayRef<double, 3> left,
                     ArrayRef<double, 3> right, double error, double cluster_tolerance,
                     ArrayRef<std::int64_t, 2> ids, ArrayRef<std::int64_t, 2> clusters,
                     const Context& context);

extern template class Branches<float>;
extern template class Branches<double>;

}  // namespace dlnfast
