// SPDX-License-Identifier: MIT
// Bounds on the errors of tracked singular values, and on all other singular values.
//
// In the bases (u_1 .. u_j, ..), (x_1 .. x_j, ..) of the first j measured pairs
// (subspace_iteration.hpp)
//
//   W = [ S  R^T ]     |sigma_i - s_i| <= 2 |R|^2 / (g + sqrt(g^2 + 4 |R|^2)),   g = s_i - |M|        (1)
//       [ 0   M  ]
//
// for the singular values above |M| (Li and Li, Linear Algebra Appl. 395, 2005; |R| where g = 0),
// and max(s_i, |M|) + |R| bounds the others. The norm of M, the tail, cannot be bounded from
// residuals. It is at most the least of
//
//   ||M||_F = sqrt(||W||_F^2 - sum s_i^2 - ||R||_F^2)                              (rigorous)         (2)
//   the certified tail (krylov_, gram_certificate.hpp, origin_bound.hpp)  (as certified)    (3)
//   |M_j| <= max(s_j+1, |M_l|) + |R of the pairs j+1 .. l|,  l > j                                    (4)
//
// The certified tail of an earlier update bounds the tail of a later one, with pairs U', X' instead
// of U, X:
//
//   |M'| <= |M| + (sum of the bounds on ||W - W_before||) + a b s_1 + (a + b) |R|                     (5)
//   a = || U (1 - U'^T U') ||_F,  b = || X (1 - X'^T X') ||_F
//
// The errors of the reported vectors of the first k pairs are at most (Wedin)
//
//   |R| / (s_k - |M| - |R|) + their rotation against the measured ones                                (6)
#pragma once

#include <vector>

#include "dlnfast/svd_tracker.hpp"
#include "numbers.hpp"
#include "subspace_iteration.hpp"

namespace dlnfast {

// An upper bound, and whether it is rigorous or probabilistic.
struct Bound {
  double value = infinity;
  Completeness kind = Completeness::none;

  void at_most(double other, Completeness other_kind) {
    if (other < value) {
      value = other;
      kind = other_kind;
    }
  }
};

// Whether an error is within the tolerance of a tracker, up to rounding.
inline bool is_within(double tolerance, double error, double largest_value, double rounding_bound) {
  return error <= tolerance * largest_value + 16.0 * rounding_bound;
}

// Returns a bound on the distance between eigenvalues of [A R^T; R C] and of diag(A, C), for an eigenvalue of A
// that is `gap` above all of C, |R| = eta: (1).
double perturbation(double gap, double eta);

template <class T>
class TailBounds {
 public:
  // `subspace` must outlive the bounds.
  TailBounds(const SubspaceIteration<T>& subspace, double tolerance)
      : subspace_(subspace), tolerance_(tolerance) {}

  // Sets the certified tail: a bound on the complement of the first j measured pairs of the current
  // W.
  void certify(const Bound& tail, Index j);
  // Discards the certified tail.
  void reset() { certified_.bound = {}; }
  // Resets the drift after a full decomposition of W. The certified tail, of an earlier W, is
  // discarded.
  void restart() {
    reset();
    drift_ = 0.0;
  }
  // Reports that the measured pairs are no longer the certified ones.
  void invalidate_pairs() { certified_.is_for_current_pairs = false; }

  // Bound on ||W - W_c||_2, W_c the matrix of the last certificate or decomposition.
  double drift() const { return drift_; }
  void add_drift(double moved) { drift_ += moved; }
  void set_drift(double drift) { drift_ = drift; }

  // Computes the tails, (2) to (5), and from them errors, completeness and tail of the record, (1).
  // `squared_norm` is ||W||_F^2; negative if unknown.
  void find_errors(double squared_norm, TrackerRecord& record, const Context& context);
  // Records that errors were not computed, because they would be too large.
  void skip_errors() { largest_error_ = infinity; }
  double largest_error() const { return largest_error_; }
  bool is_good_enough() const {
    return is_within(tolerance_, largest_error_, subspace_.reported().values[0],
                     subspace_.rounding_bound());
  }
  // Bound on the complement of the first j measured pairs.
  const Bound& tail(Index j) const { return tails_[j]; }

  // Returns (6), a bound on sqrt(||sin U||_F^2 + ||sin V||_F^2) of the k reported pairs; NaN if
  // there is none.
  double vector_error(const Context& context) const;

 private:
  struct Certified {
    Bound bound;
    Index rank = 0;                     // number of pairs
    bool is_for_current_pairs = false;  // no sweep since then
    Matrix<T> left, right;
    double largest_value = 0.0;  // s_1
    double residual = 0.0;       // |R|
  };

  void find_tails(double squared_norm, const Context& context);
  void bound_by_norm(double squared_norm);
  void bound_by_certificate(const Context& context);
  void transfer(Index j, double moved_tail, const Context& context);

  const SubspaceIteration<T>& subspace_;
  double tolerance_;
  std::vector<Bound> tails_;  // for the complements of 0 .. p pairs
  Certified certified_;
  double drift_ = 0.0;
  double largest_error_ = infinity;
};

extern template class TailBounds<float>;
extern template class TailBounds<double>;

}  // namespace dlnfast
