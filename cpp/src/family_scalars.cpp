// SPDX-License-Identifier: MIT
#include "family_scalars.hpp"

#include <algorithm>
#include <cmath>

#include "numbers.hpp"

namespace dlnfast {

FamilyScalars::FamilyScalars(std::vector<Family> families, const Rates& rates, double loss_scale)
    : families_(std::move(families)),
      rates_(rates),
      loss_scale_(loss_scale),
      layers_(rates.learning_rate.size()) {
  const Index n_layers = static_cast<Index>(rates.learning_rate.size());
  for (const Family& family : families_) {
    const Index length = static_cast<Index>(family.rho.size());
    require_layers(family.first, length, n_layers);
    if (family.coupling != 0.0 && length != n_layers) {
      throw ShapeError("a family that does not run through all layers is coupled");
    }
    for (Index i = 0; i < length; ++i) {
      const Index layer = family.first + i;
      layers_[static_cast<std::size_t>(layer)].push_back({rho.size(), family.multiplicity});
      layer_.push_back(layer);
      learning_rate_.push_back(rates.learning_rate_at(0, layer));
      weight_decay_.push_back(rates.weight_decay_at(0, layer));
      momentum_.push_back(rates.momentum_at(0, layer));
      rho.push_back(family.rho[static_cast<std::size_t>(i)]);
    }
  }
  velocity.assign(rho.size(), 0.0);
  gradient.assign(rho.size(), 0.0);
  compensation_.assign(rho.size(), 0.0);
  factor.assign(rho.size(), rates.optimizer ? rates.optimizer->epsilon : 0.0);
}

void FamilyScalars::load(const MatrixRef<double>& state) {
  if (state.absent()) return;
  require_shape(state, state.rows == 4 ? 4 : 3, static_cast<Index>(rho.size()), "scalars");
  std::vector<double>* rows[4] = {&rho, &velocity, &compensation_, &factor};
  for (Index i = 0; i < state.rows; ++i)
    std::copy(state.row(i), state.row(i) + state.cols, rows[i]->begin());
}

void FamilyScalars::store(const MatrixRef<double>& state) const {
  if (state.absent()) return;
  const std::vector<double>* rows[4] = {&rho, &velocity, &compensation_, &factor};
  for (Index i = 0; i < state.rows; ++i) std::copy(rows[i]->begin(), rows[i]->end(), state.row(i));
}

double FamilyScalars::size(Index layer) const {
  double largest = 0.0;
  for (const Entry& entry : of_layer(layer)) {
    const double r = std::abs(rho[entry.index]);
    largest = std::isfinite(r) ? std::max(largest, r) : infinity;
  }
  return largest;
}

double FamilyScalars::loss() const {
  double total = 0.0;
  for (const double r : rho) total += 0.0 * r;  // NaN if any scalar is not finite
  const double* r = rho.data();
  for (const Family& family : families_) {
    const std::size_t n = family.rho.size();
    if (family.coupling != 0.0 && family.multiplicity != 0.0) {
      double squares = 1.0;
      for (std::size_t i = 0; i < n; ++i) squares *= r[i] * r[i];
      total += 0.5 * loss_scale_ * family.coupling * family.multiplicity * squares;
    }
    r += n;
  }
  return total;
}

void FamilyScalars::compute_gradients() {
  std::fill(gradient.begin(), gradient.end(), 0.0);  // an update rule has overwritten them
  std::size_t begin = 0;
  for (const Family& family : families_) {
    const std::size_t end = begin + family.rho.size();
    if (family.coupling != 0.0) {
      // Products of the squares of the other scalars, from the left and from the right: no division.
      double left = loss_scale_ * family.coupling;
      for (std::size_t i = begin; i < end; ++i) {
        gradient[i] = left * rho[i];
        left *= rho[i] * rho[i];
      }
      double right = 1.0;
      for (std::size_t i = end; i-- > begin;) {
        gradient[i] *= right;
        right *= rho[i] * rho[i];
      }
    }
    begin = end;
  }
}

void FamilyScalars::add(std::size_t index, double change) {
  const double corrected = change - compensation_[index];
  const double sum = rho[index] + corrected;
  compensation_[index] = (sum - rho[index]) - corrected;
  rho[index] = sum;
}

void FamilyScalars::set_step(Index step) {
  const auto layer_of = [this](std::size_t i) { return layer_[i]; };
  Rates::read_row(rates_.tables.learning_rate_table, step, learning_rate_, layer_of);
  Rates::read_row(rates_.tables.weight_decay_table, step, weight_decay_, layer_of);
  Rates::read_row(rates_.tables.momentum_table, step, momentum_, layer_of);
}

void FamilyScalars::descend() {
  for (std::size_t i = 0; i < rho.size(); ++i) {
    velocity[i] = momentum_[i] * velocity[i] + gradient[i] + weight_decay_[i] * rho[i];
    add(i, -learning_rate_[i] * velocity[i]);
  }
}

}  // namespace dlnfast
