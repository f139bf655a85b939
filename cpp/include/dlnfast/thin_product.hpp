// SPDX-License-Identifier: MIT
// Products of a large matrix W (m x n) with a thin block of k rows, and updates of W fused into them.
//
// The thin blocks are stored as k rows (k x m or k x n). A pass reads W once; a fused pass reads and
// writes it once: 8 m n bytes, or 16 m n, in float64, against 2 k m n flops per product or update.
// Both kinds deal disjoint pieces of W and of the result to the team, so no pass needs a lock.
#pragma once

#include "dlnfast/fields.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Widest block for which these kernels are meant; above it `multiply` is the better tool.
inline constexpr Index thin_limit = 64;

// The descent of one matrix along a gradient of rank k, G = scale * L^T R with L (k x m), R (k x n):
//   without momentum  W <- W - learning_rate * weight_decay W - learning_rate G,
//   with momentum     V <- momentum V + G + weight_decay W;  W <- W - learning_rate V.
// W changes by one rounded subtraction: a factor 1 - learning_rate * weight_decay, or a subtraction
// for each term, is rounded in the same direction at every step of a slow phase.
template <class T>
struct Descent {
  T scale = T(1);
  T learning_rate = T(0);
  T weight_decay = T(0);
  T momentum = T(0);
  MatrixRef<T> velocity;  // V; no data: no momentum
  DLNFAST_FIELDS("Descent", scale, learning_rate, weight_decay, momentum, velocity)

  // 0 where decay takes all of W, so that exactly -learning_rate G remains; otherwise 1.
  T kept() const { return learning_rate * weight_decay == T(1) ? T(0) : T(1); }
};

// Y = X W^T for X (k x n), Y (k x m).
template <class T>
void thin_times_transpose(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                          const Context& context);

// Y = X W for X (k x m), Y (k x n).
template <class T>
void thin_times(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y, const Context& context);

// Y = R W^T with the old W, then W descends along scale * L^T R. One pass over W.
template <class T>
void thin_times_transpose_and_descend(MatrixRef<const T> left, MatrixRef<const T> right,
                                      MatrixRef<T> w, MatrixRef<T> y, const Descent<T>& descent,
                                      const Context& context);

// Y = L W with the old W, then W descends along scale * L^T R. One pass over W.
template <class T>
void thin_times_and_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                            MatrixRef<T> y, const Descent<T>& descent, const Context& context);

// W descends along scale * L^T R. One pass over W.
template <class T>
void thin_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                  const Descent<T>& descent, const Context& context);

}  // namespace dlnfast
