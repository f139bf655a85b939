// SPDX-License-Identifier: MIT
// The complement of the active subspaces: one scalar for each layer of a family of directions.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/reduced_descent.hpp"

namespace dlnfast {

// The scalars rho of all families, one family after the other, with their gradients, and the state of
// the optimizer: velocities, compensation of Kahan sums, and the diagonal factor of shampoo.
class FamilyScalars {
 public:
  // A scalar of a layer: the layer contains `multiplicity` singular values |rho| of these directions.
  struct Entry {
    std::size_t index;  // into the vectors below
    double multiplicity;
  };

  // Throws ShapeError where a family does not fit the layers.
  FamilyScalars(std::vector<Family> families, const Rates& rates, double loss_scale);

  // State of the caller: 3 x n, or 4 x n with the factors of shampoo; absent: nothing.
  void load(const MatrixRef<double>& state);
  void store(const MatrixRef<double>& state) const;

  // Largest absolute scalar of a layer; infinity where one is not finite.
  double size(Index layer) const;
  // Part of the loss; NaN where a scalar is not finite.
  double loss() const;
  void compute_gradients();
  // Sets the hyperparameters of `descend`, those of step `step`.
  void set_step(Index step);
  // A step of gradient descent along the last gradients.
  void descend();

  const std::vector<Entry>& of_layer(Index layer) const {
    return layers_[static_cast<std::size_t>(layer)];
  }
  // rho += change, as a Kahan sum.
  void add(std::size_t index, double change);

  std::vector<double> rho, velocity, gradient, factor;

 private:
  std::vector<Family> families_;
  Rates rates_;
  double loss_scale_;
  std::vector<std::vector<Entry>> layers_;
  std::vector<Index> layer_;  // of each scalar
  std::vector<double> learning_rate_, weight_decay_, momentum_;
  std::vector<double> compensation_;
};

}  // namespace dlnfast
