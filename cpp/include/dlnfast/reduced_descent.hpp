// SPDX-License-Identifier: MIT
// Gradient descent inside the closure: small cores, and one scalar per layer for the complement.
//
// W_l(t) = A_l C_l(t) A_{l-1}^T + sum_f rho_{f,l}(t) J_{f,l} with constant isometries J_{f,l}. The
// cores C_l follow the gradient descent of a small network with target A_L^T Phi A_0. The
// complement is a sum of families of directions, each of which runs through some consecutive
// layers. A family through all layers, over an eigenspace of S with eigenvalue s, adds c/2 m s
// prod_k rho_k^2 to the loss; the gradient of its scalar rho_l is c s rho_l prod_{k!=l} rho_k^2. A
// family that begins or ends at a hidden layer has no gradient, only weight decay: s = 0.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"

namespace dlnfast {

// Directions outside the active subspaces that share one scalar per layer.
struct Family {
  Index first = 0;            // first layer, from 0
  double multiplicity = 0.0;  // m, number of directions
  double coupling = 0.0;      // s; nonzero for families through all layers only
  std::vector<double> rho;    // rho_l(0) for l = first, first + 1, ..
  DLNFAST_FIELDS("Family", first, multiplicity, coupling, rho)
};

template <class T>
class ReducedDescent final : public Stepper {
 public:
  // `cores` holds C_1(0) .. C_L(0), C_l of shape a_l x a_{l-1}; the stepper overwrites it. Widths
  // up to 32 use kernels of fixed size, padded with zeros, which gradient descent preserves
  // exactly. `scalars` (3 x n, 4 x n for shampoo, or absent) holds the state of the scalars of all
  // families: rows for rho, velocity, compensation (Kahan) and the factor of shampoo. `store` writes
  // the cores and these scalars.
  ReducedDescent(std::vector<MatrixRef<T>> cores, const Objective<T>& objective,
                 std::vector<Family> families, const Rates& rates, const Context& context,
                 const OptimizerState<T>& state = {}, MatrixRef<double> scalars = {});
  ~ReducedDescent() override;

  double evaluate() override;
  bool is_scheduled() const override;
  void set_step(Index step) override;
  void update() override;
  Index n_layers() const override;
  double largest_entry(Index layer) const override;  // of the core, or a scalar
  Index steps_per_poll() const override;
  void store() override;

  // The scalars of all families, one family after the other.
  const std::vector<double>& rho() const;

  // The cores of the caller, for their shapes: their entries follow by `store`.
  const std::vector<MatrixRef<T>>& cores() const;

  // Copies the core of layer `index` (from 0) to `out`, a_l x a_{l-1} contiguous.
  void copy_core(Index index, T* out) const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

extern template class ReducedDescent<float>;
extern template class ReducedDescent<double>;

}  // namespace dlnfast
