// SPDX-License-Identifier: MIT
// One step of gradient descent by plain products, to check the engines against.
#pragma once

#include <utility>
#include <vector>

#include "check.hpp"

namespace bench {

using dlnfast::Index;
using dlnfast::Matrix;

// Random weights that preserve the norm of their inputs on average, and a random target.
template <class T>
struct Network {
  std::vector<Matrix<T>> weights;  // W_1 .. W_L
  Matrix<T> target;

  explicit Network(const std::vector<Index>& widths) : target(draw(widths.back(), widths.front())) {
    for (std::size_t l = 1; l < widths.size(); ++l) {
      weights.push_back(draw(widths[l], widths[l - 1]));
    }
  }

  std::vector<dlnfast::MatrixRef<T>> refs() {
    return std::vector<dlnfast::MatrixRef<T>>(weights.begin(), weights.end());
  }

 private:
  static Matrix<T> draw(Index rows, Index cols) {
    return check::random_matrix<T>(rows, cols, std::sqrt(3.0 / double(cols)));
  }
};

// E = W_{L:1} - Phi and G_l = W_{L:l+1}^T E W_{l-1:1}^T, multiplied from the left, so that products
// with thin outputs stay thin.
template <class T>
struct PlainStep {
  double loss;  // |E|^2 / 2
  std::vector<Matrix<T>> gradients;

  explicit PlainStep(const Network<T>& network) {
    const std::size_t n = network.weights.size();
    std::vector<Matrix<T>> left(n);  // W_{L:l+1}; the last is the identity
    const Index outputs = network.target.rows();
    left[n - 1] = Matrix<T>::Identity(outputs, outputs);
    for (std::size_t l = n - 1; l-- > 0;) left[l].noalias() = left[l + 1] * network.weights[l + 1];
    Matrix<T> right = left[0] * network.weights[0] - network.target;  // E W_{l-1:1}^T
    loss = 0.5 * double(right.squaredNorm());
    for (std::size_t l = 0; l < n; ++l) {
      gradients.push_back(left[l].transpose() * right);
      right = (right * network.weights[l].transpose()).eval();
    }
  }
};

// Checks that after = before - rate G.
template <class T>
void check_layer(const Matrix<T>& before, const Matrix<T>& after, const Matrix<T>& gradient,
                 double rate) {
  const double error = double((before - after - T(rate) * gradient).norm());
  CHECK_NEAR(error, 0.0,
             check::tolerance<T>(0) * double(before.norm()) +
                 rate * check::tolerance<T>(before.cols()) * double(gradient.norm()));
}

}  // namespace bench
