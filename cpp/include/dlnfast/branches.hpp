// SPDX-License-Identifier: MIT
// Who is who among singular values from record to record: clusters, branches, signs and reference angles.
//
// Sorted order says nothing about identity: values cross. A branch is a singular value with its pair of
// vectors, followed by their overlaps |<u_i, u'_j>| |<v_i, v'_j>| with those of the record before. Above
// one half that names at most one partner; what is left is assigned so that the sum of overlaps is
// largest (Kuhn's method). Vectors stand as rows.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/fields.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

struct BranchSettings {
  double cluster_tolerance = 1e-8;  // beside the largest value: below it values count as equal
  bool signed_values = false;
  DLNFAST_FIELDS("BranchSettings", cluster_tolerance, signed_values)
};

// Between two subspaces: the largest principal angle, and the Frobenius norm of the sines.
struct BlockAngle {
  double largest;
  double frobenius;
};

// Runs of values whose neighbours differ by less than four times their errors, or by less than
// `tolerance` times the largest: an index for each, descending values given.
std::vector<std::int64_t> find_clusters(const std::vector<double>& values,
                                        const std::vector<double>& errors, double tolerance);

// The assignment of rows to columns with the largest sum; -1 where a row has no column (more rows than
// columns). `gain` is row-major, n_rows x n_cols, nonnegative. O(n^3).
std::vector<Index> best_assignment(const std::vector<double>& gain, Index n_rows, Index n_cols);

// Follows up to p branches. Memory: four blocks of the vectors' size.
template <class T>
class Branches {
 public:
  explicit Branches(const BranchSettings& settings);
  ~Branches();

  // Compares with the record before, and remembers these vectors for the next. Within groups of equal
  // values (to rounding) u and v are rotated by one common rotation towards the vectors
  // before; then the pairs are flipped so that no sign turns: u and v together or, with signed_values,
  // each by itself, and a value whose vectors no longer agree is negative (its analytic branch went
  // through zero). No pair of values further apart than `reach` is matched by a weak overlap.
  void follow(const std::vector<double>& values, const std::vector<double>& errors, double reach,
              MatrixRef<T> left, MatrixRef<T> right, const Context& context);

  // Goes on from what another has followed, in other coordinates: these are the vectors of its last record.
  void adopt(const Branches<double>& other, MatrixRef<const T> left, MatrixRef<const T> right);

  // Of the last record, in its order. Ids count from 0 in the order of their appearance.
  const std::vector<std::int64_t>& ids() const { return ids_; }
  const std::vector<std::int64_t>& clusters() const { return clusters_; }
  const std::vector<double>& signs() const { return signs_; }  // 1, or -1 with signed_values
  // The overlap of each vector pair with its partner before; 1 where there was no record before.
  const std::vector<double>& overlaps() const { return overlaps_; }
  std::int64_t n_branches() const { return next_id_; }
  const std::vector<double>& values() const { return values_; }

  // From here on angles are measured to these vectors; those of the last record, where none are given.
  void set_reference();
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right);
  bool has_reference() const { return has_reference_; }

  // Radians between the vectors of the last record and the reference's of the same branch (of the same
  // index, where the reference was given); NaN for a branch that the reference does not have.
  std::vector<double> angles(bool left) const;
  // Between the spans of the first k vectors.
  BlockAngle block_angle(bool left, Index k, const Context& context) const;

 private:
  void align_groups(const std::vector<double>& values, MatrixRef<T> left, MatrixRef<T> right,
                    Matrix<T>& left_overlap, Matrix<T>& right_overlap, const Context& context);
  void match(const std::vector<double>& values, double reach, const Matrix<T>& left_overlap,
             const Matrix<T>& right_overlap);

  BranchSettings settings_;
  Matrix<T> left_, right_;  // of the record before
  Matrix<T> reference_left_, reference_right_;
  std::vector<double> values_;
  std::vector<std::int64_t> ids_, clusters_, reference_ids_;
  std::vector<double> signs_, overlaps_;
  std::vector<Index> partner_;
  std::int64_t next_id_ = 0;
  bool has_reference_ = false;
  bool reference_given_ = false;
};

extern template class Branches<float>;
extern template class Branches<double>;

}  // namespace dlnfast
