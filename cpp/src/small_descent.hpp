// SPDX-License-Identifier: MIT
// Gradient descent of networks that fit the registers and the first-level cache.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"

namespace dlnfast {

// Weights of widths up to `small_limit`, padded with zeros to one square size. A padded unit has
// zero weights on both sides and zero error, hence a zero gradient: it stays zero.
template <class T>
class SmallDescent : public Stepper {
 public:
  // Writes G_1 .. G_L at the weights of the last `evaluate`, instead of an update.
  virtual void compute_gradients(const std::vector<MatrixRef<T>>& gradients) = 0;
  virtual void load_weight(Index layer, const MatrixRef<T>& weight) = 0;
  virtual void store_weight(Index layer, const MatrixRef<T>& weight) const = 0;
  // Load or store the state of one layer; absent matrices are skipped.
  virtual void load_state(Index layer, const MatrixRef<T>& velocity,
                          const MatrixRef<T>& compensation) = 0;
  virtual void store_state(Index layer, const MatrixRef<T>& velocity,
                           const MatrixRef<T>& compensation) const = 0;

  void load_state(const OptimizerState<T>& state) {
    for (Index l = 0; l < this->n_layers(); ++l)
      load_state(l, of(state.velocity, l), of(state.compensation, l));
  }
  void store_state(const OptimizerState<T>& state) const {
    for (Index l = 0; l < this->n_layers(); ++l)
      store_state(l, of(state.velocity, l), of(state.compensation, l));
  }

 private:
  static MatrixRef<T> of(const std::vector<MatrixRef<T>>& matrices, Index layer) {
    return matrices.empty() ? MatrixRef<T>() : matrices[static_cast<std::size_t>(layer)];
  }
};

// Returns a stepper for layers of widths up to `size`, with zero weights; null if `size` exceeds
// the limit.
template <class T>
std::unique_ptr<SmallDescent<T>> small_descent(Index size, Index n_layers,
                                               const Objective<T>& objective, const Rates& rates);

extern template std::unique_ptr<SmallDescent<float>> small_descent<float>(Index, Index,
                                                                          const Objective<float>&,
                                                                          const Rates&);
extern template std::unique_ptr<SmallDescent<double>> small_descent<double>(
    Index, Index, const Objective<double>&, const Rates&);

}  // namespace dlnfast
