// SPDX-License-Identifier: MIT
#include "dlnfast/reduced_descent.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/dense_descent.hpp"
#include "numbers.hpp"
#include "small_descent.hpp"

namespace dlnfast {
namespace {

// The scalars of all families and their velocities.
class Scalars {
 public:
  Scalars(std::vector<Family> families, const Rates& rates, double loss_scale)
      : families_(std::move(families)), loss_scale_(loss_scale) {
    const Index n_layers = static_cast<Index>(rates.learning_rate.size());
    for (const Family& family : families_) {
      const Index length = static_cast<Index>(family.rho.size());
      require_layers(family.first, length, n_layers);
      if (family.coupling != 0.0 && length != n_layers) {
        throw ShapeError("a family that does not run through all layers is coupled");
      }
      for (Index i = 0; i < length; ++i) {
        const Index layer = family.first + i;
        learning_rate_.push_back(rates.learning_rate[layer]);
        weight_decay_.push_back(rates.weight_decay[layer]);
        momentum_.push_back(rates.momentum[layer]);
        rho_.push_back(family.rho[i]);
      }
    }
    velocity_.assign(rho_.size(), 0.0);
    gradient_.assign(rho_.size(), 0.0);
    compensation_.assign(rho_.size(), 0.0);
  }

  const std::vector<double>& rho() const { return rho_; }

  void load(const MatrixRef<double>& state) {
    if (state.absent()) return;
    require_shape(state, 3, static_cast<Index>(rho_.size()), "scalars");
    std::vector<double>* rows[3] = {&rho_, &velocity_, &compensation_};
    for (Index i = 0; i < 3; ++i)
      std::copy(state.row(i), state.row(i) + state.cols, rows[i]->begin());
  }

  void store(const MatrixRef<double>& state) const {
    if (state.absent()) return;
    const std::vector<double>* rows[3] = {&rho_, &velocity_, &compensation_};
    for (Index i = 0; i < 3; ++i) std::copy(rows[i]->begin(), rows[i]->end(), state.row(i));
  }

  double size(Index layer) const {
    double largest = 0.0;
    const double* rho = rho_.data();
    for (const Family& family : families_) {
      const Index n = static_cast<Index>(family.rho.size());
      if (family.first <= layer && layer < family.first + n) {
        const double r = std::abs(rho[layer - family.first]);
        largest = std::isfinite(r) ? std::max(largest, r) : infinity;
      }
      rho += n;
    }
    return largest;
  }

  double loss() const {
    double total = 0.0;
    for (const double r : rho_) total += 0.0 * r;  // NaN if any scalar is not finite
    const double* rho = rho_.data();
    for (const Family& family : families_) {
      const std::size_t n = family.rho.size();
      if (family.coupling != 0.0 && family.multiplicity != 0.0) {
        double squares = 1.0;
        for (std::size_t i = 0; i < n; ++i) squares *= rho[i] * rho[i];
        total += 0.5 * loss_scale_ * family.coupling * family.multiplicity * squares;
      }
      rho += n;
    }
    return total;
  }

  void update() {
    std::size_t begin = 0;
    for (const Family& family : families_) {
      const std::size_t end = begin + family.rho.size();
      if (family.coupling != 0.0) {
        // Products of the squares of the other scalars, from the left and from the right: no
        // division.
        double left = loss_scale_ * family.coupling;
        for (std::size_t i = begin; i < end; ++i) {
          gradient_[i] = left * rho_[i];
          left *= rho_[i] * rho_[i];
        }
        double right = 1.0;
        for (std::size_t i = end; i-- > begin;) {
          gradient_[i] *= right;
          right *= rho_[i] * rho_[i];
        }
      }
      begin = end;
    }
    for (std::size_t i = 0; i < rho_.size(); ++i) {
      velocity_[i] = momentum_[i] * velocity_[i] + gradient_[i] + weight_decay_[i] * rho_[i];
      // Kahan sum, as for the cores (small_descent.cpp).
      const double corrected = -learning_rate_[i] * velocity_[i] - compensation_[i];
      const double sum = rho_[i] + corrected;
      compensation_[i] = (sum - rho_[i]) - corrected;
      rho_[i] = sum;
    }
  }

 private:
  std::vector<Family> families_;
  double loss_scale_;
  // Of each scalar, as everything below.
  std::vector<double> learning_rate_, weight_decay_, momentum_;
  std::vector<double> rho_, velocity_, gradient_, compensation_;
};

}  // namespace

template <class T>
class ReducedDescent<T>::Impl {
 public:
  Impl(std::vector<MatrixRef<T>> cores, const Objective<T>& objective, std::vector<Family> families,
       const Rates& rates, const Context& context, const OptimizerState<T>& state,
       MatrixRef<double> scalar_state)
      : cores_(std::move(cores)),
        state_(state),
        scalar_state_(scalar_state),
        scalars_((check_shapes(objective, rates), std::move(families)), rates,
                 objective.loss_scale) {
    check_state(state, cores_);
    scalars_.load(scalar_state_);
    Index size = 0;
    for (const auto& core : cores_) size = std::max({size, core.rows, core.cols});
    small_ = small_descent<T>(size, static_cast<Index>(cores_.size()), objective, rates);
    if (small_ == nullptr) {
      large_ = std::make_unique<DenseDescent<T>>(cores_, objective, rates, context, 0, state_);
      return;
    }
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      small_->load_weight(static_cast<Index>(l), cores_[l]);
    }
    small_->load_state(state_);
  }

  void store() {
    scalars_.store(scalar_state_);
    if (large_) {
      large_->store();
      return;
    }
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      small_->store_weight(static_cast<Index>(l), cores_[l]);
    }
    small_->store_state(state_);
  }

  Stepper& stepper() const {
    return small_ ? static_cast<Stepper&>(*small_) : static_cast<Stepper&>(*large_);
  }

  void copy_core(Index index, T* out) const {
    if (index < 0 || index >= n_layers()) {
      throw ShapeError("there is no core " + std::to_string(index));
    }
    const MatrixRef<T>& core = cores_[index];
    const MatrixRef<T> target(out, core.rows, core.cols);
    if (small_) {
      small_->store_weight(index, target);
    } else {
      target.map() = core.map();
    }
  }

  const std::vector<MatrixRef<T>>& cores() const { return cores_; }
  Scalars& scalars() { return scalars_; }
  const Scalars& scalars() const { return scalars_; }
  Index n_layers() const { return static_cast<Index>(cores_.size()); }

 private:
  void check_shapes(const Objective<T>& objective, const Rates& rates) const {
    if (cores_.empty()) throw ShapeError("cores is empty; wanted at least one layer");
    Index width = cores_.front().cols;
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      require_shape(cores_[l], cores_[l].rows, width, "cores[" + std::to_string(l) + "]");
      width = cores_[l].rows;
    }
    if (!objective.has_target()) throw ShapeError("cores descend on a target, not on observations");
    check_statistics(objective, width, cores_.front().cols);
    require_length(static_cast<Index>(rates.learning_rate.size()), n_layers(), "learning_rate");
    require_length(static_cast<Index>(rates.weight_decay.size()), n_layers(), "weight_decay");
    require_length(static_cast<Index>(rates.momentum.size()), n_layers(), "momentum");
  }

  std::vector<MatrixRef<T>> cores_;
  OptimizerState<T> state_;
  MatrixRef<double> scalar_state_;
  Scalars scalars_;
  std::unique_ptr<SmallDescent<T>> small_;
  std::unique_ptr<DenseDescent<T>> large_;
};

template <class T>
ReducedDescent<T>::ReducedDescent(std::vector<MatrixRef<T>> cores, const Objective<T>& objective,
                                  std::vector<Family> families, const Rates& rates,
                                  const Context& context, const OptimizerState<T>& state,
                                  MatrixRef<double> scalars)
    : impl_(std::make_unique<Impl>(std::move(cores), objective, std::move(families), rates, context,
                                   state, scalars)) {}

template <class T>
ReducedDescent<T>::~ReducedDescent() = default;

template <class T>
double ReducedDescent<T>::evaluate() {
  return impl_->stepper().evaluate() + impl_->scalars().loss();
}

template <class T>
void ReducedDescent<T>::update() {
  impl_->stepper().update();
  impl_->scalars().update();
}

template <class T>
double ReducedDescent<T>::largest_entry(Index layer) const {
  return std::max(impl_->stepper().largest_entry(layer), impl_->scalars().size(layer));
}

template <class T>
Index ReducedDescent<T>::steps_per_poll() const {
  return impl_->stepper().steps_per_poll();
}

template <class T>
void ReducedDescent<T>::store() {
  impl_->store();
}

template <class T>
Index ReducedDescent<T>::n_layers() const {
  return impl_->n_layers();
}

template <class T>
const std::vector<double>& ReducedDescent<T>::rho() const {
  return impl_->scalars().rho();
}

template <class T>
const std::vector<MatrixRef<T>>& ReducedDescent<T>::cores() const {
  return impl_->cores();
}

template <class T>
void ReducedDescent<T>::copy_core(Index index, T* out) const {
  impl_->copy_core(index, out);
}

template class ReducedDescent<float>;
template class ReducedDescent<double>;

}  // namespace dlnfast
