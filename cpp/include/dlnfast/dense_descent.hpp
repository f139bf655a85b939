// SPDX-License-Identifier: MIT
// Gradient descent on whole weight matrices of any widths.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"
#include "dlnfast/thin_product.hpp"

namespace dlnfast {

// Returns the layer at which splitting the chain W_L ... W_1 costs least per step. For a pivot p,
// every product has d_p rows or columns: T_l = W_{p:l} and B_l for the layers up to p, P_l =
// W_{l:p+1} and D_l above.
//   E = P_L T_1 S - Phi
//   l <= p:  B_1 = P_L^T E,  G_l = W_{p:l+1}^T B_l,  B_{l+1} = B_l W_l^T
//   l >  p:  D_L = E T_1^T,  G_l = D_l W_{l-1:p+1}^T, D_{l-1} = W_l^T D_l
// p = L is best for few outputs, p = 0 for few inputs, and a hidden bottleneck for its own width.
// With equal widths every pivot takes 6 (L - 1) d^3 flops, and p = L is chosen. If few entries of
// Phi are observed and the pivot is a hidden layer, E is never formed: P_L^T E and E T_1^T are
// computed from the entries (completion.hpp). `end_product_entries` is the cost of the product P_L
// T_1 for a hidden pivot, in entries; by default d_L d_0, the cost for a dense E.
Index best_pivot(const std::vector<Index>& widths, double end_product_entries = -1.0);

// Returns the flops of one step with this pivot, for S = I.
double step_flops(const std::vector<Index>& widths, Index pivot, double end_product_entries = -1.0);

class FamilyScalars;

// Receives every step of a layer whose gradient is known in factored form, G = scale L^T R, before
// the step is applied. Layers count from 0. The blocks are valid during the call only.
template <class T>
class UpdateListener {
 public:
  virtual ~UpdateListener() = default;
  virtual void on_thin_update(Index layer, MatrixRef<const T> left, MatrixRef<const T> right,
                              const GradientStep<T>& step, const Context& context) = 0;
};

// Writes G_1 .. G_L (descent.hpp), G_l of the shape of W_l, and returns the loss. Does not change
// the weights. Costs one step: it uses the products of DenseDescent.
template <class T>
double compute_gradients(const std::vector<MatrixRef<const T>>& weights,
                         const Objective<T>& objective, const std::vector<MatrixRef<T>>& gradients,
                         const Context& context);

// Gradient descent that updates `weights` (W_1 .. W_L, W_l of shape d_l x d_{l-1}) in place. Layers
// with learning rate 0 are not written.
//
// Further memory: the thin products, E, packed operands, one velocity per layer with momentum, and
// one gradient if layers have weight decay and no thin side.
//
// Networks of width up to `small` use a copy that fits the first-level cache, if that is faster.
// `weights()`, `store()` and the destructor write this copy back to the caller's arrays.
//
// With an update rule (Rates::optimizer), the gradients are written first, one further matrix for each
// layer. `scalars` are those of a complement that takes the same steps (family_scalars.hpp).
//
// If Interrupted leaves `update`, the weights are those between two steps.
template <class T>
class DenseDescent final : public Stepper {
 public:
  DenseDescent(std::vector<MatrixRef<T>> weights, const Objective<T>& objective, const Rates& rates,
               const Context& context, Index small = small_limit,
               const OptimizerState<T>& state = {}, FamilyScalars* scalars = nullptr);
  ~DenseDescent() override;

  double evaluate() override;
  bool is_scheduled() const override;
  void set_step(Index step) override;
  void update() override;
  Index n_layers() const override;
  double largest_entry(Index layer) const override;
  double rate() const override;
  Index steps_per_poll() const override;
  void store() override;

  // The caller's arrays, up to date.
  const std::vector<MatrixRef<T>>& weights() const;

  // Whether the updates of this layer are thin, so that a listener receives them.
  bool is_thin(Index layer) const;
  // The listener must outlive the steps; nullptr removes it.
  void set_update_listener(UpdateListener<T>* listener);

 private:
  class Impl;
  friend double compute_gradients<T>(const std::vector<MatrixRef<const T>>&, const Objective<T>&,
                                     const std::vector<MatrixRef<T>>&, const Context&);
  std::unique_ptr<Impl> impl_;
};

extern template class DenseDescent<float>;
extern template class DenseDescent<double>;
extern template double compute_gradients(const std::vector<MatrixRef<const float>>&,
                                         const Objective<float>&,
                                         const std::vector<MatrixRef<float>>&, const Context&);
extern template double compute_gradients(const std::vector<MatrixRef<const double>>&,
                                         const Objective<double>&,
                                         const std::vector<MatrixRef<double>>&, const Context&);

}  // namespace dlnfast
