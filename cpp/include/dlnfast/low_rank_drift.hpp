// SPDX-License-Identifier: MIT
// A matrix in factored form: an initial matrix plus low-rank updates, W = s W_0 + P^T Q, in small
// frames.
//
// The frames U (a x m) and V (b x n) have orthonormal rows and are closed: W_0 V^T lies in the span
// of U^T, and W_0^T U^T in that of V^T. Hence
//
//   W = U^T K V + s (W_0 - U^T K_0 V),   K = s K_0 + C,   K_0 = U W_0 V^T,                          (1)
//
// where C holds the updates in the coordinates of the frames. If W_0 is eps times an isometry
// (orthonormal columns, or rows), the singular values of W are those of K, and |s| eps for all
// other directions. From such a start, gradient descent stays in a frame of two or three times the
// target's rank (Yaras et al., arXiv 2306.01154). After the first few steps, an update costs 8 k a
// (m + n) flops and does not read W_0.
//
// With heavy-ball momentum the velocity is stored in the same frames:
//
//   V = v W_0 + U^T C_v V.                                                                          (2)
#pragma once

#include <vector>

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"

namespace dlnfast {

// Scale of W_0, and its distance from that scale times an isometry.
struct Isometry {
  double scale = 0.0;      // eps = ||W_0||_F / sqrt(min(m, n))
  double departure = 0.0;  // bound on ||W_0^T W_0 / eps^2 - 1||_2 (of the smaller side)
  bool rigorous = false;   // false: the bound holds with probability 1 - 1e-10
};

// Measures the scale and departure of w. The bound is rigorous if the smaller side is at most
// `exact_limit` (2 m n min(m, n) flops), otherwise it comes from random vectors (32 m n flops).
// Allocates no matrix of the size of w.
template <class T>
Isometry measure_isometry(MatrixRef<const T> w, const Context& context, Index exact_limit = 1024);

template <class T>
class LowRankDrift {
 public:
  // Keeps a reference to `initial`, W_0, which must not change. The frames have at most `limit`
  // vectors.
  LowRankDrift(MatrixRef<const T> initial, const Isometry& isometry, Index limit);
  ~LowRankDrift();

  // W <- factor W + scale L^T R, for L (k x m) and R (k x n). Copies L and R; `flush` adds them to
  // the frames.
  void update(double factor, double scale, MatrixRef<const T> left, MatrixRef<const T> right,
              const Context& context);
  // A gradient step along G = scale L^T R (thin_product.hpp), with momentum:
  //   V <- momentum V + G + weight_decay W,  W <- W - learning_rate V.
  void descend(double scale, double learning_rate, double weight_decay, double momentum,
               MatrixRef<const T> left, MatrixRef<const T> right, const Context& context);

  // Adds all pending updates to the frames, and extends the frames where needed. Returns false if
  // the frames would exceed `limit` vectors, or if W has grown or shrunk beyond the range in which
  // they are accurate. Then all later calls return false as well, and the error of W is at most
  // `truncated`.
  bool flush(const Context& context);

  // Whether the frames represent all of W, up to `truncated` and pending updates.
  bool is_closed() const { return closed_; }
  Index rows() const { return initial_.rows; }
  Index cols() const { return initial_.cols; }
  const Isometry& isometry() const { return isometry_; }
  double initial_factor() const { return initial_factor_; }  // s
  MatrixRef<const T> left_frame() const { return {left_.data(), n_left_, initial_.rows}; }
  MatrixRef<const T> right_frame() const { return {right_.data(), n_right_, initial_.cols}; }
  Matrix<double> core() const;  // K, a x b
  // Bound on || W - (1) ||_F.
  double truncated() const { return truncated_; }
  MatrixRef<const T> initial() const { return initial_; }

 private:
  // Rows begin .. begin + size - 1 of the pending blocks: adds weight L^T R to W, and velocity L^T
  // R to V.
  struct Pending {
    Index begin;
    Index size;
    double weight;
    double velocity;
  };

  void append(double weight, double velocity, MatrixRef<const T> left, MatrixRef<const T> right,
              const Context& context);
  void combine(double ww, double wv, double vw, double vv);
  bool add_pending(const Context& context);
  double magnitude() const;
  bool extend(MatrixRef<T> left_block, MatrixRef<T> right_block, const Context& context);

  MatrixRef<const T> initial_;
  Isometry isometry_;
  Index limit_;
  bool closed_ = true;
  Matrix<T> left_, right_;  // U and V, with memory for limit_ rows
  Index n_left_ = 0, n_right_ = 0;
  Matrix<double> initial_core_, core_, velocity_core_;   // K_0, C, C_v
  double initial_factor_ = 1.0, velocity_factor_ = 0.0;  // s, v
  Matrix<T> pending_left_, pending_right_;
  std::vector<Pending> pending_;
  Index n_pending_ = 0;
  double truncated_ = 0.0, velocity_truncated_ = 0.0;
  Random random_{1};
};

extern template class LowRankDrift<float>;
extern template class LowRankDrift<double>;

}  // namespace dlnfast
