// SPDX-License-Identifier: MIT
// A matrix as what it was and what came to it: W = s W_0 + P^T Q, kept in a small closed frame.
//
// Frames U (a x m) and V (b x n) have orthonormal rows, and W_0 maps each into the other: W_0 V^T lies in
// the span of U^T, W_0^T U^T in that of V^T. So
//   W = U^T K V + s (W_0 - U^T K_0 V),   K = s K_0 + C,   K_0 = U W_0 V^T,
// where C is what the updates left in the frames. If W_0 is eps times an isometry (orthonormal columns, or
// rows), all singular values of W are those of K and |s| eps for the rest. Gradient descent from such a
// start stays in a frame of two or three times the target's rank (Yaras et al., arXiv 2306.01154), so
// after the first few steps an update costs 8 k a (m + n) flops and W_0 is not read again.
//
// With heavy ball the velocity is kept in the same frames, V = v W_0 + U^T C_v V.
#pragma once

#include <vector>

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"

namespace dlnfast {

// How far W_0 is from eps times an isometry.
struct Isometry {
  double scale = 0.0;      // eps = ||W_0||_F / sqrt(min(m, n))
  double departure = 0.0;  // bound on ||W_0^T W_0 / eps^2 - 1||_2 (of the smaller side)
  bool rigorous = false;   // otherwise it holds with probability 1 - 1e-10
};

// Rigorous where the smaller side is at most `exact_limit` (2 m n min(m, n) flops); otherwise from random
// vectors (32 m n flops). No memory of the matrix's size.
template <class T>
Isometry measure_isometry(MatrixRef<const T> w, const Context& context, Index exact_limit = 1024);

template <class T>
class LowRankDrift {
 public:
  // W_0 stays where it is and must not change. Frames of at most `limit` vectors.
  LowRankDrift(MatrixRef<const T> initial, const Isometry& isometry, Index limit);
  ~LowRankDrift();

  // W <- factor W + scale L^T R, for L (k x m), R (k x n). Copied; put into the frames by `flush`.
  void update(double factor, double scale, MatrixRef<const T> left, MatrixRef<const T> right,
              const Context& context);
  // A step of descent along G = scale L^T R (thin_product.hpp): with momentum,
  //   V <- momentum V + G + weight_decay W,  W <- W - learning_rate V.
  void descend(double scale, double learning_rate, double weight_decay, double momentum,
               MatrixRef<const T> left, MatrixRef<const T> right, const Context& context);

  // Puts all updates into the frames and extends these where needed. False, for good, where the frames
  // would need more than `limit` vectors, or W has grown or shrunk beyond what they can hold: then W is
  // known up to `truncated` only.
  bool flush(const Context& context);

  bool closed() const { return closed_; }
  Index rows() const { return initial_.rows; }
  Index cols() const { return initial_.cols; }
  const Isometry& isometry() const { return isometry_; }
  double shrink() const { return shrink_; }  // s
  MatrixRef<const T> left_frame() const { return {left_.data(), n_left_, initial_.rows}; }
  MatrixRef<const T> right_frame() const { return {right_.data(), n_right_, initial_.cols}; }
  Matrix<double> core() const;  // K, a x b
  // Bound on || W - (what the frames hold) ||_F.
  double truncated() const { return truncated_; }
  MatrixRef<const T> initial() const { return initial_; }

 private:
  struct Pending {
    Index begin;
    Index size;
    double weight;    // of its L^T R in W
    double velocity;  // and in V
  };

  void append(double weight, double velocity, MatrixRef<const T> left, MatrixRef<const T> right,
              const Context& context);
  void take(double factor_ww, double factor_wv, double factor_vw, double factor_vv);
  bool take_in(const Context& context);
  double size() const;
  bool extend(MatrixRef<T> left_rest, MatrixRef<T> right_rest, const Context& context);

  MatrixRef<const T> initial_;
  Isometry isometry_;
  Index limit_;
  bool closed_ = true;
  Matrix<T> left_, right_;  // frames, room for limit_ rows
  Index n_left_ = 0, n_right_ = 0;
  Matrix<double> initial_core_, core_, velocity_core_;  // K_0, C, C_v
  double shrink_ = 1.0, velocity_shrink_ = 0.0;         // s, v
  Matrix<T> pending_left_, pending_right_;
  std::vector<Pending> pending_;
  Index n_pending_ = 0;
  double truncated_ = 0.0, velocity_truncated_ = 0.0;
  Random random_{1};
};

extern template class LowRankDrift<float>;
extern template class LowRankDrift<double>;

}  // namespace dlnfast
