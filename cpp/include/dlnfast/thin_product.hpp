// SPDX-License-Identifier: MIT
// Products of a large matrix W (m x n) with a thin block of k rows, and updates of W fused into
// them.
//
// Thin blocks are stored as k rows (k x m or k x n). A pass reads W once, a fused pass reads and
// writes it once: 8 m n bytes, or 16 m n, in float64, against 2 k m n flops per product or update.
// Threads own disjoint parts of W and of the result, so no pass needs a lock.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/reflection.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Largest number of rows of a thin block; above it `multiply` is faster.
inline constexpr Index thin_limit = 64;

// One gradient step of a matrix W along a gradient of rank k, G = scale * L^T R with L (k x m), R
// (k x n):
//   without momentum  W <- W - learning_rate * weight_decay W - learning_rate G,
//   with momentum     V <- momentum V + G + weight_decay W;  W <- W - learning_rate V.
// The update is a single rounded subtraction. A multiplication by 1 - learning_rate * weight_decay,
// or one subtraction per term, would round in the same direction at every step of a slow phase.
template <class T>
struct GradientStep {
  T scale = T(1);
  T learning_rate = T(0);
  T weight_decay = T(0);
  T momentum = T(0);
  MatrixRef<T> velocity;  // V; absent: no momentum
  DLNFAST_FIELDS("Descent", scale, learning_rate, weight_decay, momentum, velocity)

  // Returns 0 if weight decay removes all of W, so that exactly -learning_rate G remains; otherwise
  // 1.
  T weight_factor() const { return learning_rate * weight_decay == T(1) ? T(0) : T(1); }
};

// Y = X W^T for X (k x n), Y (k x m).
template <class T>
void thin_times_transpose(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                          const Context& context);

// Y = X W for X (k x m), Y (k x n).
template <class T>
void thin_times(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y, const Context& context);

// Y = R W^T with the old W, then a gradient step of W along scale * L^T R. One pass over W.
template <class T>
void thin_times_transpose_and_descend(MatrixRef<const T> left, MatrixRef<const T> right,
                                      MatrixRef<T> w, MatrixRef<T> y, const GradientStep<T>& step,
                                      const Context& context);

// Y = L W with the old W, then a gradient step of W along scale * L^T R. One pass over W.
template <class T>
void thin_times_and_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                            MatrixRef<T> y, const GradientStep<T>& step, const Context& context);

// A gradient step of W along scale * L^T R. One pass over W.
template <class T>
void thin_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                  const GradientStep<T>& step, const Context& context);

}  // namespace dlnfast
