// SPDX-License-Identifier: MIT
// Block subspace iteration: the sweeps of a tracker, and their starting blocks.
//
// One sweep multiplies p orthonormal right vectors X (p x n, rows) twice, 4 m n p flops:
//
//   X W^T = A S B^T Y,  Y orthonormal:   x = A^T X,  u = B^T Y   satisfy   W x_i = s_i u_i        (1)
//   r_i = W^T u_i - s_i x_i                                                                       (2)
//   u W = A' S' B'^T Y':   u' = A'^T u,  v' = B'^T Y'   satisfy   W^T u'_i = s'_i v'_i            (3)
//
// (1) are the `measured` pairs, whose residuals R = (r_i) follow from (2). (3) are the `reported`
// pairs: s_i <= s'_i <= sigma_i. The next sweep starts from v'.
#pragma once

#include <cmath>
#include <vector>

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"

namespace dlnfast {

// W is m x n; k values are reported.
struct TrackerShape {
  Index m, n;
  Index smaller;  // min(m, n)
  Index k;
};

// Singular values, and their vectors as rows: u_i of `left`, v_i of `right`.
template <class T>
struct SingularPairs {
  Matrix<T> left, right;
  std::vector<double> values;
};

template <class T>
class SubspaceIteration {
 public:
  // `p` vectors; `random` must outlive the iteration.
  SubspaceIteration(const TrackerShape& shape, Index p, Random& random);

  const TrackerShape& shape() const { return shape_; }
  Index size() const { return p_; }  // p
  const SingularPairs<T>& measured() const { return measured_; }
  const SingularPairs<T>& reported() const { return reported_; }
  // Writable, for the tiers that compute the reported pairs in another way.
  SingularPairs<T>& reported() { return reported_; }
  // A' of (3), p x p: the reported left vectors are A'^T times the measured ones.
  const Matrix<double>& rotation() const { return rotation_; }

  // Bound on the rounding error of a singular value, here or in LAPACK.
  double rounding_bound() const { return rounding_bound_; }
  void set_rounding_bound(double largest_value);

  // Return ||r_i||^2, and a bound on ||R||_F of the measured pairs begin .. end - 1.
  double squared_residual(Index i) const { return residual_[i]; }
  double residual(Index begin, Index end) const {
    double total = 0.0;
    for (Index i = begin; i < end; ++i) total += residual_[i];
    return std::sqrt(total) + rounding_bound_;
  }
  // Returns the largest j <= k such that the first j measured pairs have converged and a gap above
  // 0.4 `tolerance` s_j separates them from the others; 0 if there is none.
  Index n_separated(double tolerance) const;

  // Allocates memory for p vectors, once.
  void allocate();
  // Adds zero vectors, which `replace_guards` fills.
  void grow(Index p);

  // Sets the first block: these right vectors (rows), completed by random ones.
  void seed(MatrixRef<const T> right, const Context& context);
  // Uses the reported right vectors as the next starting block.
  void start_from_reported() { has_start_ = true; }
  // Prepares the block of the next sweep. Returns true if there was none, so that it is random.
  bool prepare(const Context& context);
  // Discards the block: the next update starts from random vectors.
  void reset();

  // Computes (1) to (3). Copies u W to `image` unless that is null.
  void sweep(const LinearOperator<T>& w, Matrix<T>* image, const Context& context);

  // Replaces the next starting block by the best one in the Krylov space of W^T W from it, with `steps`
  // products: (8 steps + 4) m n p flops. Converges as Chebyshev polynomials of this degree do, which powers of
  // W^T W at the edge of a bulk of values do not.
  void accelerate(const LinearOperator<T>& w, Index steps, const Context& context);

  // Build a block from the first j reported right vectors, `candidates` (orthonormal rows), and as
  // many of the other reported vectors as fit: for the next sweep, or for the first sweep of the
  // next update.
  void replace_guards(Index j, const Matrix<T>& candidates, const Context& context);
  void plan_guards(Index j, const Matrix<T>& candidates, const Context& context);
  // If W maps the span of the measured right vectors to that of the left ones and back, starts the
  // next update from the measured right vectors, unless a start is planned already. Another sweep
  // would only amplify rounding errors along the leading directions and lose the last ones. Layers
  // with an orthogonal start change within such a span.
  void reuse_invariant_block();

 private:
  void diagonalize(Matrix<T>& x, Matrix<T>& y, std::vector<double>& values, const Context& context);
  void rotate(Matrix<T>& x, const Matrix<double>& a, const Context& context);
  void combine(Index j, const Matrix<T>& candidates, Matrix<T>& block, const Context& context);

  TrackerShape shape_;
  Index p_;
  Random& random_;
  SingularPairs<T> measured_, reported_;
  std::vector<double> residual_;  // squared norms
  Matrix<double> rotation_;
  double rounding_bound_ = 0.0;
  bool has_start_ = false;
  Matrix<T> planned_;  // block of the next update; no rows: use the reported right vectors
  Matrix<T> scratch_;
};

extern template class SubspaceIteration<float>;
extern template class SubspaceIteration<double>;

}  // namespace dlnfast
