// SPDX-License-Identifier: MIT
// The leading singular values and vectors of a slowly changing matrix, with bounds on their errors.
//
// A block of p = k + guards vectors is stored from update to update. Each update uses one of three
// tiers; the headers in cpp/src have the mathematics:
//
//   dense     one sweep of block subspace iteration, 4 m n p flops (subspace_iteration.hpp). Errors follow
//             from residuals and from a bound on the complement of the block (tail_bounds.hpp). This bound
//             is the least of: ||W||_F minus the part in the block; a Krylov space from random vectors
//             (krylov_certificate.hpp) or, for small tolerances, a Cholesky factorisation of a Gram matrix
//             (gram_certificate.hpp); the matrix of the first update (origin_bound.hpp); and the bound of
//             an earlier update plus the distance that W has moved since (drift_meter.hpp if unknown).
//   full      a Gram matrix (gram_decomposition.hpp) or an SVD of W (full_tier.hpp).
//   factored  an SVD of the core of a matrix in factored form (factored_tier.hpp).
//
// Branches connect the values from update to update (branches.hpp).
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "dlnfast/branches.hpp"
#include "dlnfast/linear_operator.hpp"
#include "dlnfast/low_rank_drift.hpp"

namespace dlnfast {

// Mode "automatic" decomposes matrices whose smaller side is at most this, whatever k is.
inline constexpr Index largest_full_size = 128;
// The same if no bound on the drift is known: a decomposition then costs less than a certificate.
inline constexpr Index largest_gram_size = 320;
// Tolerance, relative to the largest value, that random certificates reach at the edge of a bulk of values. For
// smaller ones, matrices are certified by a Gram matrix.
inline constexpr double krylov_tolerance = 0.02;
// Largest smaller side of matrices that are certified by a Gram matrix, of 8 s^2 bytes (gram_certificate.hpp).
inline constexpr Index largest_certified_size = 4096;

enum class Tier { reduced = 0, factored = 1, dense = 2, full = 3 };
enum class Completeness { none = 0, probabilistic = 1, rigorous = 2 };
enum class TrackerMode { automatic, dense, full };
inline constexpr const char* tier_names[] = {"reduced", "factored", "dense", "full"};
inline constexpr const char* completeness_names[] = {"none", "probabilistic", "rigorous"};
inline constexpr const char* tracker_mode_names[] = {"auto", "dense", "full"};
constexpr auto& names_of(Tier) { return tier_names; }
constexpr auto& names_of(Completeness) { return completeness_names; }
constexpr auto& names_of(TrackerMode) { return tracker_mode_names; }

struct TrackerSettings {
  Index n_values = 16;  // k
  Index n_guards = 8;   // additional vectors, tracked but not reported
  TrackerMode mode = TrackerMode::automatic;
  double tolerance = 0.05;  // largest accepted error, relative to the largest value
  double failure = 1e-10;   // probability that a certificate is wrong
  Index max_sweeps = 2;     // per update
  Index refresh_every = 0;  // updates between certificates; 0: only when bounds are too large
  // Columns multiplied for certificates, per column multiplied by a sweep, if the drift is known.
  double certificate_share = std::numeric_limits<double>::infinity();
  bool follow = true;  // follow vectors and branches, not only values
  // Measure angles to the reference, and the orthogonality of both sides, not only of U.
  bool measure_angles = true;
  std::uint64_t seed = 0;  // seed of the random vectors
  BranchSettings branches;
  DLNFAST_FIELDS("TrackerSettings", n_values, n_guards, mode, tolerance, failure, max_sweeps,
                 refresh_every, seed, branches)
};

struct TrackerRecord {
  std::int64_t update = 0;  // index of the update, from 0
  Tier tier = Tier::dense;
  Completeness completeness = Completeness::none;
  bool refreshed = false;                         // a certificate was computed
  std::vector<double> values;                     // k, descending
  std::vector<double> errors;                     // |sigma_i - values_i| <= errors_i
  std::vector<double> gaps;                       // distances to the nearest other tracked value
  std::vector<double> signs;                      // 1, or -1 with signed_values
  std::vector<std::int64_t> clusters, branches;   // branches: -1 if not followed
  std::vector<double> left_angles, right_angles;  // radians to the reference; NaN without one
  BlockAngle left_block{}, right_block{};
  double norm = 0.0;           // ||W||_F; NaN: unknown
  double tail = 0.0;           // bound on all singular values that are not reported
  double drift = 0.0;          // bound on ||W - W_c||_2, W_c the matrix of the last certificate
  double vector_error = 0.0;   // bound on sqrt(||sin U||_F^2 + ||sin V||_F^2) of all k; NaN: none
  double truncated = 0.0;      // bound on the error of the factored form
  double orthogonality = 0.0;  // largest entry of |U U^T - 1| and |V V^T - 1|
  double overlap = 1.0;        // smallest overlap of a reported pair with the previous record
  double rho = 0.0;            // value that most directions share; NaN: unknown
  double rho_spread = 0.0;     // largest difference between values counted as rho
  Index multiplicity = 0;      // number of directions with the value rho
  double seconds = 0.0;
  Index n_columns = 0;  // number of vectors multiplied by W or W^T
  DLNFAST_FIELDS("TrackerRecord", update, tier, completeness, refreshed, values, errors, gaps,
                 signs, clusters, branches, left_angles, right_angles, left_block, right_block,
                 norm, tail, drift, vector_error, truncated, orthogonality, overlap, rho,
                 rho_spread, multiplicity, seconds, n_columns)
};

template <class T>
class SvdTracker {
 public:
  SvdTracker(Index rows, Index cols, const TrackerSettings& settings);
  ~SvdTracker();
  SvdTracker(SvdTracker&&) noexcept;

  Index rows() const;
  Index cols() const;
  Index n_values() const;  // k, at most min(rows, cols)

  // Computes the singular values of the next W. `drift` bounds the 2-norm of its difference to the
  // previous one; infinity if no bound is known. Throws std::domain_error if W is not finite.
  const TrackerRecord& update(MatrixRef<const T> w, double drift, const Context& context);
  const TrackerRecord& update(const LinearOperator<T>& w, double drift, const Context& context);
  // The same for a matrix in factored form: O(a (m + n) (k + a)) with frames of a vectors. The
  // frames must be closed (`drift.flush`). `drift` must not change while its vectors are read or
  // set as reference.
  const TrackerRecord& update(const LowRankDrift<T>& drift, const Context& context);

  const TrackerRecord& record() const;
  std::int64_t n_refreshes() const;
  std::int64_t n_certificates() const;
  // Vectors of the last record as rows, k x m and k x n; absent without `follow`.
  MatrixRef<const T> left() const;
  MatrixRef<const T> right() const;

  // Sets the matrix of the first update, W_0, which later updates use for bounds on the complement.
  // Stores a reference: the matrix must not change.
  void set_origin(MatrixRef<const T> w);
  // Sets right vectors from which the next update starts (rows; any number, not necessarily
  // orthonormal).
  void seed(MatrixRef<const T> right, const Context& context);
  // Sets the reference of the angles: the last record, or the vectors passed. The default is the
  // first record whose values are not one cluster.
  void set_reference();
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

extern template class SvdTracker<float>;
extern template class SvdTracker<double>;

}  // namespace dlnfast
