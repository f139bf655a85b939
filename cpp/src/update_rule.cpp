// SPDX-License-Identifier: MIT
#include "update_rule.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

#include "dlnfast/product.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

const std::vector<FamilyScalars::Entry> no_entries;

void check_settings(const Optimizer& optimizer, Index n_layers) {
  require_length(static_cast<Index>(optimizer.coefficients.size()), 3, "coefficients");
  if (optimizer.iterations < 0) throw std::invalid_argument("iterations is negative");
  if (optimizer.rule != Rule::muon) return;
  require_length(static_cast<Index>(optimizer.direction_scale.size()), n_layers, "direction_scale");
}

// Adds G G^T to decay P and G^T G to decay Q; returns P^(-1/4) G Q^(-1/4). In double precision for all T.
Matrix<double> precondition(const Matrix<double>& g, const MatrixRef<double>& left,
                            const MatrixRef<double>& right, double decay, const Context& context) {
  const MatrixRef<const double> gradient = view(g);
  multiply<double>(1.0, gradient, Op::none, gradient, Op::transpose, decay, left, context);
  multiply<double>(1.0, gradient, Op::transpose, gradient, Op::none, decay, right, context);
  const Matrix<double> p = inverse_fourth_root(left, context);
  const Matrix<double> q = inverse_fourth_root(right, context);
  Matrix<double> half(g.rows(), g.cols()), whole(g.rows(), g.cols());
  multiply<double>(view(p), Op::none, gradient, Op::none, half, context);
  multiply<double>(view(half), Op::none, view(q), Op::none, whole, context);
  return whole;
}

}  // namespace

template <class T>
UpdateRule<T>::UpdateRule(std::vector<MatrixRef<T>> weights, const Rates& rates,
                          const OptimizerState<T>& state, FamilyScalars* scalars)
    : rates_(rates), optimizer_(*rates.optimizer), scalars_(scalars) {
  check_settings(optimizer_, static_cast<Index>(weights.size()));
  check_state(state, weights);
  const bool is_muon = optimizer_.rule == Rule::muon;
  own_.reserve(3 * weights.size());
  own_factors_.reserve(2 * weights.size());
  // The caller's matrix, or one of zeros.
  const auto bind = [&](const std::vector<MatrixRef<T>>& given, std::size_t l) {
    if (!given.empty()) return given[l];
    own_.push_back(Matrix<T>::Zero(weights[l].rows, weights[l].cols));
    return MatrixRef<T>(own_.back());
  };
  const auto bind_factor = [&](const std::vector<MatrixRef<double>>& given, std::size_t l,
                               Index n) {
    if (!given.empty()) return given[l];
    own_factors_.push_back(Matrix<double>::Identity(n, n) * optimizer_.epsilon);
    return MatrixRef<double>(own_factors_.back());
  };
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const MatrixRef<T>& w = weights[l];
    Layer layer;
    layer.index = static_cast<Index>(l);
    layer.weight = w;
    layer.gradient = bind({}, l);
    if (rates.any_momentum()) layer.velocity = bind(state.velocity, l);
    if (std::max(w.rows, w.cols) <= small_limit) layer.compensation = bind(state.compensation, l);
    if (is_muon && optimizer_.method == PolarMethod::newton_schulz) {
      layer.newton_schulz = newton_schulz<T>(w.rows, w.cols);
    }
    if (optimizer_.rule == Rule::shampoo) {
      layer.left_factor = bind_factor(state.left_factors, l, w.rows);
      layer.right_factor = bind_factor(state.right_factors, l, w.cols);
    }
    gradients_.push_back(layer.gradient);
    layers_.push_back(std::move(layer));
  }
}

template <class T>
void UpdateRule<T>::update(const Context& context) {
  if (scalars_ != nullptr) scalars_->compute_gradients();
  for (Layer& layer : layers_) {
    const Entries& entries = scalars_ != nullptr ? scalars_->of_layer(layer.index) : no_entries;
    switch (optimizer_.rule) {
      case Rule::nesterov: step_nesterov(layer, entries); break;
      case Rule::muon: step_muon(layer, entries, context); break;
      case Rule::shampoo: step_shampoo(layer, entries, context); break;
    }
  }
}

template <class T>
void UpdateRule<T>::step_nesterov(Layer& layer, const Entries& entries) {
  const double decay = rates_.weight_decay_at(step_, layer.index);
  const double momentum = rates_.momentum_at(step_, layer.index);
  auto g = layer.gradient.map().array();
  if (decay != 0.0) g += static_cast<T>(decay) * layer.weight.map().array();
  if (!layer.velocity.absent()) {
    auto v = layer.velocity.map().array();
    v = static_cast<T>(momentum) * v + g;
    g += static_cast<T>(momentum) * v;
  }
  for (const auto& [i, multiplicity] : entries) {
    double& direction = scalars_->gradient[i];
    direction += decay * scalars_->rho[i];
    scalars_->velocity[i] = momentum * scalars_->velocity[i] + direction;
    direction += momentum * scalars_->velocity[i];
  }
  move(layer, entries, rates_.learning_rate_at(step_, layer.index), 0.0);
}

template <class T>
void UpdateRule<T>::step_muon(Layer& layer, const Entries& entries, const Context& context) {
  const double momentum = rates_.momentum_at(step_, layer.index);
  const double fresh = 1.0 - momentum;
  if (!layer.velocity.absent()) {
    auto g = layer.gradient.map().array();
    auto v = layer.velocity.map().array();
    v = static_cast<T>(momentum) * v + static_cast<T>(fresh) * g;
    if (optimizer_.nesterov) {
      g = static_cast<T>(momentum) * v + static_cast<T>(fresh) * g;
    } else {
      g = v;
    }
    for (const auto& [i, multiplicity] : entries) {
      double& direction = scalars_->gradient[i];
      double& velocity = scalars_->velocity[i];
      velocity = momentum * velocity + fresh * direction;
      direction = optimizer_.nesterov ? momentum * velocity + fresh * direction : velocity;
    }
  }
  orthogonalize(layer, entries, context);
  const double rate = rates_.learning_rate_at(step_, layer.index);
  const double scale = optimizer_.direction_scale[static_cast<std::size_t>(layer.index)];
  move(layer, entries, rate * scale, rate * rates_.weight_decay_at(step_, layer.index));
}

template <class T>
void UpdateRule<T>::orthogonalize(Layer& layer, const Entries& entries, const Context& context) {
  std::vector<double>* direction = scalars_ != nullptr ? &scalars_->gradient : nullptr;
  if (optimizer_.method == PolarMethod::newton_schulz) {
    double squares = static_cast<double>(layer.gradient.map().squaredNorm());
    for (const auto& [i, multiplicity] : entries)
      squares += multiplicity * (*direction)[i] * (*direction)[i];
    const double norm = std::max(std::sqrt(squares), optimizer_.epsilon);
    layer.gradient.map() /= static_cast<T>(norm);
    layer.newton_schulz->iterate(layer.gradient, optimizer_, context);
    for (const auto& [i, multiplicity] : entries)
      (*direction)[i] = newton_schulz((*direction)[i] / norm, optimizer_);
    return;
  }
  double largest = 0.0;
  for (const auto& [i, multiplicity] : entries) {
    if (multiplicity > 0.0) largest = std::max(largest, std::abs((*direction)[i]));
  }
  const double tolerance = optimizer_.rank_tolerance;
  largest = polar_factor<T>(layer.gradient, largest, tolerance, context);
  for (const auto& [i, multiplicity] : entries) {
    double& d = (*direction)[i];
    d = std::abs(d) > tolerance * largest ? std::copysign(1.0, d) : 0.0;
  }
}

template <class T>
void UpdateRule<T>::step_shampoo(Layer& layer, const Entries& entries, const Context& context) {
  const double momentum = rates_.momentum_at(step_, layer.index);
  const Matrix<double> g = layer.gradient.map().template cast<double>();
  const Matrix<double> direction =
      precondition(g, layer.left_factor, layer.right_factor, optimizer_.decay, context);
  layer.gradient.map() = direction.template cast<T>();
  for (const auto& [i, multiplicity] : entries) {
    double& d = scalars_->gradient[i];
    double& factor = scalars_->factor[i];
    factor = optimizer_.decay * factor + d * d;
    d /= std::sqrt(factor);
    scalars_->velocity[i] = momentum * scalars_->velocity[i] + d;
    d = scalars_->velocity[i];
  }
  if (!layer.velocity.absent()) {
    auto v = layer.velocity.map();
    v = static_cast<T>(momentum) * v + layer.gradient.map();
    layer.gradient.map() = v;
  }
  const double rate = rates_.learning_rate_at(step_, layer.index);
  move(layer, entries, rate, rate * rates_.weight_decay_at(step_, layer.index));
}

// W <- (1 - shrink) W - step D with the direction D in the gradient. The update is a single rounded
// sum, compensated for small layers, as in small_descent.cpp.
template <class T>
void UpdateRule<T>::move(Layer& layer, const Entries& entries, double step, double shrink) {
  auto w = layer.weight.map().array();
  auto change = layer.gradient.map().array();
  change = -static_cast<T>(step) * change - static_cast<T>(shrink) * w;
  if (layer.compensation.absent()) {
    w += change;
  } else {
    for (Index row = 0; row < layer.weight.rows; ++row) {
      T* to = layer.weight.row(row);
      T* compensation = layer.compensation.row(row);
      const T* by = layer.gradient.row(row);
      for (Index col = 0; col < layer.weight.cols; ++col) {
        const T corrected = by[col] - compensation[col];
        const T sum = to[col] + corrected;
        compensation[col] = (sum - to[col]) - corrected;
        to[col] = sum;
      }
    }
  }
  for (const auto& [i, multiplicity] : entries)
    scalars_->add(i, -step * scalars_->gradient[i] - shrink * scalars_->rho[i]);
}

template class UpdateRule<float>;
template class UpdateRule<double>;

}  // namespace dlnfast
