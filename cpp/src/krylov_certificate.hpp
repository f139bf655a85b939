// SPDX-License-Identifier: MIT
// Probabilistic bound on the norm of the complement of the tracked pairs, from a block Krylov
// space.
//
// M is the complement of the first j measured pairs (subspace_iteration.hpp), of dims = n - j right
// directions. From b random vectors, the space of (M^T M)^i, i < q, is built; theta^2 is the
// largest Ritz value of M^T M in it. Each of these bounds fails with a probability of at most f:
//
//   |M|   <= theta / sqrt(1 - e),  sqrt(e) = (ln(1.648 sqrt(dims)) + ln(1/f) / b) / (2q - 1)       (1)
//   |M|^2 <= theta^2 + |A Q - Q T| sqrt(dims) / c,  c = f^(1/b) / 0.8                              (2)
//
// (1): Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, for b starts that must all
// fail. (2): one of b random unit vectors has a component of at least c / sqrt(dims) along the
// leading vector of A = M^T M. This bound is sharp if M has few different singular values, as in
// networks with an orthogonal start: a scaled isometry plus a matrix of low rank. A space of all
// dims directions gives |M| = theta.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "subspace_iteration.hpp"
#include "tail_bounds.hpp"

namespace dlnfast {

template <class T>
class KrylovCertificate {
 public:
  // `subspace` and `random` must outlive the certificate.
  KrylovCertificate(const TrackerSettings& settings, SubspaceIteration<T>& subspace,
                    Random& random);

  struct Result {
    double theta;
    Bound bound;      // on |M|
    Index n_columns;  // number of vectors multiplied by W or W^T
  };
  // Bounds the complement of the first j pairs, and stores up to p - j Ritz vectors. May grow the
  // subspace for these vectors if the Krylov space closes.
  Result bound(const LinearOperator<T>& w, Index j, const Context& context);

  // The leading Ritz vectors of the last certificate, rows.
  const Matrix<T>& ritz_vectors() const { return ritz_vectors_; }
  // Whether the last Krylov space was invariant, and then the number of values above the value that
  // most directions share.
  bool is_closed() const { return is_closed_; }
  Index n_above_shared() const { return n_above_shared_; }

  // Adds to the budget of certificates: `certificate_share` columns per column of a sweep.
  void add_credit(Index n_columns);
  void reset_credit() { credit_ = 0.0; }
  bool is_affordable() const { return credit_ >= 0.0; }

  std::int64_t count() const { return count_; }

 private:
  void append_start(Index n_starts, MatrixRef<const T> v, const Context& context);
  double append_products(Index size, Index n_new, Matrix<double>& gram, const Context& context);
  Index orthonormalize_next(MatrixRef<T> next, Index size, MatrixRef<const T> v, double tiny,
                            const Context& context);
  void find_ritz_vectors(const Matrix<double>& gram, Index size, Index j, const Context& context);
  std::vector<Index> choose_around_shared(const Eigen::VectorXd& values, Index j);

  TrackerSettings settings_;
  SubspaceIteration<T>& subspace_;
  Random& random_;
  Matrix<T> basis_, images_;  // of the Krylov space, and its images under M
  Matrix<T> ritz_vectors_;
  bool is_closed_ = false;
  Index n_above_shared_ = 0;
  double credit_ = 0.0;
  std::int64_t count_ = 0;
};

extern template class KrylovCertificate<float>;
extern template class KrylovCertificate<double>;

}  // namespace dlnfast
