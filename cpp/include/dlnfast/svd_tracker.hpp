// SPDX-License-Identifier: MIT
// The leading singular values and vectors of a matrix that drifts, with bounds on their errors.
//
// A block of p = k + guards right vectors is kept from event to event. One sweep multiplies it by W and
// the result by W^T, 4 m n p flops: with orthonormal X the product X W^T = A S B^T U gives vectors u, x
// with W x = s u exactly; the product u W then gives their residual r = W^T u - s x, and by its own
// decomposition the pair (u', v', s') that is reported, s <= s' <= sigma. In the bases (u, ..), (x, ..)
//
//   W = [ S  R^T ]     with  |sigma_i - s_i| <= 2 |R|^2 / (g + sqrt(g^2 + 4 |R|^2)),  g = s_i - |M|
//       [ 0   M  ]
//
// for the singular values above |M| (Li and Li, Linear Algebra Appl. 395, 2005; |R| where g = 0), and
// max(s_i, |M|) + |R| bounds the others. A residual alone says nothing about what is not tracked, so the
// norm of M is bounded in its own right, by the best of
//   * ||M||_F^2 = ||W||_F^2 - sum s_i^2 - ||R||_F^2                                    (rigorous),
//   * |c| |W_0| + || M - c M_0 ||_F for a W_0 that the drift began from, whose norm is known  (as that is),
//   * the decomposition of all of W, where it was taken                                (rigorous),
//   * a block Krylov space of M^T M from b random vectors after q products, largest Ritz value theta^2:
//     |M| <= theta / sqrt(1 - e) with sqrt(e) = (ln(1.648 sqrt(n)) + ln(1/f)/b) / (2q - 1)
//     (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992; b starts that all must fail), or
//     |M|^2 <= theta^2 + |A Q - Q T| sqrt(n) / c with c = f^(1/b) / 0.8, because one of b random unit
//     vectors has a component of at least c / sqrt(n) along the leading vector of M^T M (this is sharp
//     where few values differ, as in a scaled isometry plus low rank)           (each with probability 1 - f),
// carried on to later events: |M| grows at most by ||W' - W||, where the caller bounds that, and by what
// of the old tracked part lies outside the new one.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "dlnfast/branches.hpp"
#include "dlnfast/linear_operator.hpp"
#include "dlnfast/low_rank_drift.hpp"

namespace dlnfast {

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
  Index n_guards = 8;   // further vectors that are kept, but not reported
  TrackerMode mode = TrackerMode::automatic;
  double tolerance = 0.05;  // beside the largest value: errors above it are no promise
  double failure = 1e-10;   // probability, per certificate
  Index max_sweeps = 2;     // per event
  Index refresh_every = 0;  // events; 0: only where the bounds ask for it
  // Product columns that certificates may take beside one of a sweep, where the drift is known.
  double certificate_share = std::numeric_limits<double>::infinity();
  bool follow = true;  // vectors and branches; otherwise values alone
  bool measure_angles =
      true;  // to the reference; and the orthogonality of both sides, not of U alone
  std::uint64_t seed = 0;
  BranchSettings branches;
  DLNFAST_FIELDS("TrackerSettings", n_values, n_guards, mode, tolerance, failure, max_sweeps,
                 refresh_every, seed, branches)
};

struct TrackerRecord {
  std::int64_t event = 0;
  Tier tier = Tier::dense;
  Completeness completeness = Completeness::none;
  bool refreshed = false;
  std::vector<double> values;                     // k, descending
  std::vector<double> errors;                     // |sigma_i - values_i| <= errors_i
  std::vector<double> gaps;                       // to the nearest other value
  std::vector<double> signs;                      // 1, or -1 with signed_values
  std::vector<std::int64_t> clusters, branches;   // branches: -1 where they are not followed
  std::vector<double> left_angles, right_angles;  // radians to the reference; NaN without one
  BlockAngle left_block{}, right_block{};
  double norm = 0.0;   // ||W||_F; NaN where unknown
  double tail = 0.0;   // bound on every singular value that is not reported
  double drift = 0.0;  // bound on how far W has moved since the last certificate
  double vector_error =
      0.0;  // bound on sqrt(||sin U||_F^2 + ||sin V||_F^2) of the leading k; NaN: none
  double truncated = 0.0;      // tau, tier factored
  double orthogonality = 0.0;  // largest entry of |U U^T - 1| and |V V^T - 1|
  double overlap = 1.0;        // least overlap of a reported pair with the record before
  double rho = 0.0;            // the value that most directions share, and its spread; NaN: unknown
  double rho_spread = 0.0;
  Index multiplicity = 0;  // how many do
  double seconds = 0.0;
  Index n_columns = 0;  // vectors that were multiplied by W or W^T
  DLNFAST_FIELDS("TrackerRecord", event, tier, completeness, refreshed, values, errors, gaps, signs,
                 clusters, branches, left_angles, right_angles, left_block, right_block, norm, tail,
                 drift, vector_error, truncated, orthogonality, overlap, rho, rho_spread,
                 multiplicity, seconds, n_columns)
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

  // The next event. `drift` bounds ||W - W_before||_2; infinity where that is unknown. Throws
  // std::domain_error where W is not finite.
  const TrackerRecord& update(MatrixRef<const T> w, double drift, const Context& context);
  const TrackerRecord& update(const LinearOperator<T>& w, double drift, const Context& context);
  // The next event of a matrix in factored form: O(a (m + n) (k + a)) with frames of a vectors. The
  // frames must be closed (`drift.flush`); `drift` must stay as it is for as long as vectors are asked for.
  const TrackerRecord& update(const LowRankDrift<T>& drift, const Context& context);

  const TrackerRecord& record() const;
  std::int64_t n_refreshes() const;
  std::int64_t n_certificates() const;
  // Vectors of the last record as rows, k x m and k x n; none without `follow`.
  MatrixRef<const T> left() const;
  MatrixRef<const T> right() const;

  // W_0, where the caller holds it anyway: the matrix of the first event, which then bounds what is not
  // tracked in later ones. It must not change.
  void set_origin(MatrixRef<const T> w);
  // Starts the next event from these right vectors (rows; any number, not necessarily orthonormal).
  void seed(MatrixRef<const T> right, const Context& context);
  // Measures angles to the last record, or to given vectors, instead of to the first record whose
  // values are not one cluster.
  void set_reference();
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

extern template class SvdTracker<float>;
extern template class SvdTracker<double>;

}  // namespace dlnfast
