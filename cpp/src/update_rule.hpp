// SPDX-License-Identifier: MIT
// Update rules other than gradient descent (Optimizer in descent.hpp): sums and products of gradients,
// and functions of their singular values.
//
// Such a rule keeps the invariant subspaces. If a gradient is U C V^T + sum_f g_f J_f with isometries
// J_f that are orthogonal to each other and to the active subspaces (reduced_descent.hpp), its singular
// values are those of C, and each |g_f| as often as the family has directions. So a function of the
// singular values acts on C and on every g_f separately; only the norm that Newton-Schulz iteration
// divides by contains all of them.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"
#include "family_scalars.hpp"
#include "polar_factor.hpp"

namespace dlnfast {

template <class T>
class UpdateRule {
 public:
  // Updates `weights`, and the scalars of the complement unless that is null. The state of the caller
  // is used where it is given. Throws ShapeError where settings do not fit the layers.
  UpdateRule(std::vector<MatrixRef<T>> weights, const Rates& rates, const OptimizerState<T>& state,
             FamilyScalars* scalars);

  // Receive G_1 .. G_L before `update`.
  const std::vector<MatrixRef<T>>& gradients() const { return gradients_; }
  void set_step(Index step) { step_ = step; }
  // Overwrites the gradients. Exact polar factors and the roots of shampoo allocate memory, because
  // decompositions do; other rules do not.
  void update(const Context& context);

 private:
  // A weight matrix, and the state of its optimizer.
  struct Layer {
    Index index = 0;
    MatrixRef<T> weight, gradient, velocity, compensation;
    MatrixRef<double> left_factor, right_factor;
    std::unique_ptr<NewtonSchulz<T>> newton_schulz;
  };
  using Entries = std::vector<FamilyScalars::Entry>;

  void step_nesterov(Layer& layer, const Entries& entries);
  void step_muon(Layer& layer, const Entries& entries, const Context& context);
  void step_shampoo(Layer& layer, const Entries& entries, const Context& context);
  void orthogonalize(Layer& layer, const Entries& entries, const Context& context);
  void move(Layer& layer, const Entries& entries, double step, double shrink);

  std::vector<Layer> layers_;
  std::vector<MatrixRef<T>> gradients_;
  Rates rates_;
  Optimizer optimizer_;
  FamilyScalars* scalars_;
  Index step_ = 0;
  std::vector<Matrix<T>> own_;  // gradients and state that the caller does not keep
  std::vector<Matrix<double>> own_factors_;
};

extern template class UpdateRule<float>;
extern template class UpdateRule<double>;

}  // namespace dlnfast
