// SPDX-License-Identifier: MIT
#include "dlnfast/reduced_descent.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/dense_descent.hpp"
#include "family_scalars.hpp"
#include "small_descent.hpp"

namespace dlnfast {

template <class T>
class ReducedDescent<T>::Impl {
 public:
  Impl(std::vector<MatrixRef<T>> cores, const Objective<T>& objective, std::vector<Family> families,
       const Rates& rates, const Context& context, const OptimizerState<T>& state,
       MatrixRef<double> scalar_state)
      : cores_(std::move(cores)),
        state_(state),
        scalar_state_(scalar_state),
        has_rule_(rates.optimizer.has_value()),
        scalars_((check_shapes(objective, rates), std::move(families)), rates,
                 objective.loss_scale) {
    check_state(state, cores_);
    scalars_.load(scalar_state_);
    Index size = 0;
    for (const auto& core : cores_) size = std::max({size, core.rows, core.cols});
    if (!rates.optimizer)
      small_ = small_descent<T>(size, static_cast<Index>(cores_.size()), objective, rates);
    if (small_ == nullptr) {
      dense_ = std::make_unique<DenseDescent<T>>(cores_, objective, rates, context,
                                                 rates.optimizer ? small_limit : 0, state_,
                                                 rates.optimizer ? &scalars_ : nullptr);
      return;
    }
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      small_->load_weight(static_cast<Index>(l), cores_[l]);
    }
    small_->load_state(state_);
  }

  void store() {
    scalars_.store(scalar_state_);
    if (dense_) {
      dense_->store();
      return;
    }
    for (std::size_t l = 0; l < cores_.size(); ++l) {
      small_->store_weight(static_cast<Index>(l), cores_[l]);
    }
    small_->store_state(state_);
  }

  void set_step(Index step) {
    stepper().set_step(step);
    if (!has_rule_) scalars_.set_step(step);
  }

  void update() {
    stepper().update();
    if (has_rule_) return;  // the dense engine has updated the scalars with the cores
    scalars_.compute_gradients();
    scalars_.descend();
  }

  Stepper& stepper() const {
    return small_ ? static_cast<Stepper&>(*small_) : static_cast<Stepper&>(*dense_);
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
  FamilyScalars& scalars() { return scalars_; }
  const FamilyScalars& scalars() const { return scalars_; }
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
  bool has_rule_;
  FamilyScalars scalars_;
  // One of the two steps the cores: `small_` up to `small_limit` by gradient descent, otherwise
  // `dense_`, at any size if there is another update rule.
  std::unique_ptr<SmallDescent<T>> small_;
  std::unique_ptr<DenseDescent<T>> dense_;
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
bool ReducedDescent<T>::is_scheduled() const {
  return impl_->stepper().is_scheduled();
}

template <class T>
void ReducedDescent<T>::set_step(Index step) {
  impl_->set_step(step);
}

template <class T>
void ReducedDescent<T>::update() {
  impl_->update();
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
  return impl_->scalars().rho;
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
