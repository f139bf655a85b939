// SPDX-License-Identifier: MIT
// Gradient descent on whole weight matrices of any widths.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"
#include "dlnfast/thin_product.hpp"

namespace dlnfast {

// Where the chain W_L ... W_1 is split so that a step costs least. For a pivot p every product has
// d_p rows or columns: T_l = W_{p:l} and B_l for the layers up to p, P_l = W_{l:p+1} and D_l above.
//   E = P_L T_1 S - Phi
//   l <= p:  B_1 = P_L^T E,  G_l = W_{p:l+1}^T B_l,  B_{l+1} = B_l W_l^T
//   l >  p:  D_L = E T_1^T,  G_l = D_l W_{l-1:p+1}^T, D_{l-1} = W_l^T D_l
// p = L suits thin outputs, p = 0 thin inputs, a hidden bottleneck its own width; with equal widths
// every pivot takes 6 (L - 1) d^3 flops and L is chosen.
// Where few entries of Phi are observed and the pivot is inside, E is never formed: P_L^T E and
// E T_1^T follow from the entries (completion.hpp).
// `ends` is what the product of the two ends costs beside a pivot inside, in entries: d_L d_0 unless
// E is sparse.
Index best_pivot(const std::vector<Index>& widths, double ends = -1.0);

// Flops of one step with that pivot, S = I.
double step_flops(const std::vector<Index>& widths, Index pivot, double ends = -1.0);

// Sees every step of a layer whose gradient is known in factored form, G = scale L^T R, before it is
// taken; layers count from 0. The blocks are gone afterwards.
template <class T>
class UpdateWatcher {
 public:
  virtual ~UpdateWatcher() = default;
  virtual void thin_update(Index layer, MatrixRef<const T> left, MatrixRef<const T> right,
                           const Descent<T>& descent, const Context& context) = 0;
};

// Writes G_1 .. G_L (descent.hpp), G_l of the shape of W_l, and returns the loss. Costs one step, by the
// products of DenseDescent; weights are only read.
template <class T>
double compute_gradients(const std::vector<MatrixRef<const T>>& weights,
                         const Objective<T>& objective, const std::vector<MatrixRef<T>>& gradients,
                         const Context& context);

// The stepper that updates `weights` (W_1 .. W_L, W_l of shape d_l x d_{l-1}) in place. Memory
// beside them: the thin products, E, packed operands, one velocity per layer with momentum, and one
// gradient where layers decay and none of their sides is thin. Layers whose rate is 0 are only read.
// Networks no wider than `small`, where
// that pays, live in a copy that fits the first-level cache: `weights` follow when they are asked
// for, and in the end.
// An Interrupted that leaves `update` leaves the weights between two steps.
template <class T>
class DenseDescent final : public Stepper {
 public:
  DenseDescent(std::vector<MatrixRef<T>> weights, const Objective<T>& objective, const Rates& rates,
               const Context& context, Index small = small_limit,
               const OptimizerState<T>& state = {});
  ~DenseDescent() override;

  double evaluate() override;
  void update() override;
  Index n_layers() const override;
  double largest_entry(Index layer) const override;
  double rate() const override;
  Index steps_per_poll() const override;
  void store() override;

  // The arrays of the caller, up to date.
  const std::vector<MatrixRef<T>>& weights() const;

  // Whether the updates of this layer are thin, so that a watcher sees them.
  bool is_thin(Index layer) const;
  // Must outlive the steps; nullptr ends it.
  void watch(UpdateWatcher<T>* watcher);

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
