// SPDX-License-Identifier: MIT
#include "dlnfast/recorders.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/linear_operator.hpp"
#include "numbers.hpp"

namespace dlnfast {

namespace {

// Frames of this size represent the updates of a layer with an orthogonal start and up to 20
// outputs. Larger frames would cost more than they save.
constexpr Index frame_limit = 64;

// Largest departure of W(0) from an isometry for the factored form; it adds to every error.
template <class T>
constexpr double isometry_tolerance = sizeof(T) == 8 ? 1e-8 : 1e-3;

}  // namespace

template <class T>
DenseRecorder<T>::DenseRecorder(DenseDescent<T>& stepper, DenseRecords<T> records,
                                Tracking<T> tracking, const Objective<T>& objective,
                                const Rates& rates, const Schedule& schedule,
                                const Context& context)
    : stepper_(stepper),
      records_(std::move(records)),
      tracking_(std::move(tracking)),
      objective_(objective),
      rates_(rates),
      context_(context) {
  check_records(schedule);
  if (!records_.values.empty()) start(schedule.record_every);
}

template <class T>
DenseRecorder<T>::~DenseRecorder() {
  stepper_.set_update_listener(nullptr);
}

// All lists have one array per layer, with room for the records of the schedule.
template <class T>
void DenseRecorder<T>::check_records(const Schedule& schedule) const {
  const std::vector<MatrixRef<T>>& weights = stepper_.weights();
  const Index n_layers = static_cast<Index>(weights.size());
  const auto require_all = [&](const auto& list, const char* name) {
    require_length(static_cast<Index>(list.size()), n_layers, name);
  };
  const auto require_rooms = [&](const auto& list, Index size, const char* name,
                                 const auto& other_axes) {
    require_all(list, name);
    for (std::size_t l = 0; l < list.size(); ++l) {
      require_room(list[l], size, other_axes(l), std::string(name) + "[" + std::to_string(l) + "]");
    }
  };
  if (records_.snapshot_every < 0) throw std::invalid_argument("snapshot_every is negative");
  if (records_.snapshot_every > 0) {
    require_rooms(records_.snapshots, n_multiples(schedule, records_.snapshot_every), "snapshots",
                  [&](std::size_t l) { return std::array{weights[l].rows, weights[l].cols}; });
  }
  if (records_.values.empty()) return;
  const Index n = n_records(schedule);
  const auto width = [&](std::size_t l) {
    return std::min({records_.values[l].shape[1], weights[l].rows, weights[l].cols});
  };
  const auto widths = [&](std::size_t l) { return std::array{width(l)}; };
  require_rooms(records_.values, n, "values", widths);
  require_rooms(records_.errors, n, "errors", widths);
  require_rooms(records_.signs, n, "signs", widths);
  require_rooms(records_.branches, n, "branches", widths);
  require_rooms(records_.clusters, n, "clusters", widths);
  require_rooms(records_.tracking, n, "tracking",
                [](std::size_t) { return std::array<Index, 1>{n_tracking_columns}; });
  if (!records_.left.empty()) {
    require_rooms(records_.left, n, "left",
                  [&](std::size_t l) { return std::array{weights[l].rows, width(l)}; });
    require_rooms(records_.right, n, "right",
                  [&](std::size_t l) { return std::array{weights[l].cols, width(l)}; });
  }
  if (!tracking_.initial.empty()) require_all(tracking_.initial, "initial");
  if (!tracking_.velocity_norms.empty()) require_all(tracking_.velocity_norms, "velocity_norms");
}

template <class T>
void DenseRecorder<T>::start(Index record_every) {
  const std::vector<MatrixRef<T>>& weights = stepper_.weights();
  if (objective_.measurements) {
    gram_norm_ = squared_norm<T>(objective_.measurements->operators, context_);
  } else if (!objective_.input_gram.absent()) {
    gram_norm_ = std::sqrt(squared_norm<T>(objective_.input_gram, context_));
  }
  bool any_factored = false;
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const MatrixRef<T>& w = weights[l];
    TrackerSettings settings = tracking_.tracker.value_or(TrackerSettings());
    settings.n_values = records_.values[l].shape[1];
    const Index smaller = std::min(w.rows, w.cols);
    const bool has_all = settings.n_values >= smaller;
    if (has_all && settings.mode == TrackerMode::automatic) settings.n_guards = 0;
    const bool has_vectors = !records_.left.empty();
    // Follow branches of all values only if the vectors are recorded as well.
    settings.follow = has_vectors || !has_all;
    const bool has_thin_updates = stepper_.is_thin(static_cast<Index>(l));
    // Limits the time for certificates: their share grows with the number of steps between records.
    // A step of a layer with thin updates is only a few passes over it.
    const Index between = has_thin_updates ? 1 : std::min<Index>(record_every, 8);
    settings.certificate_share = 0.12 * static_cast<double>(between);
    settings.measure_angles = false;  // the trajectory computes them from the vectors
    const double velocity = tracking_.velocity_norms.empty() ? 0.0 : tracking_.velocity_norms[l];
    Layer layer{SvdTracker<T>(w.rows, w.cols, settings), nullptr, 0.0, velocity, 0.0};
    if (!tracking_.initial.empty()) layer.tracker.set_origin(tracking_.initial[l]);
    const bool may_be_factored = tracking_.factored && settings.mode == TrackerMode::automatic &&
                                 !tracking_.initial.empty() && has_thin_updates &&
                                 smaller > 2 * frame_limit && !(has_vectors && has_all);
    if (may_be_factored) {
      const MatrixRef<const T>& initial = tracking_.initial[l];
      const Isometry isometry = measure_isometry<T>(initial, context_);
      if (isometry.departure <= isometry_tolerance<T>) {
        layer.factored = std::make_unique<LowRankDrift<T>>(initial, isometry, frame_limit);
        any_factored = true;
      }
    }
    layers_.push_back(std::move(layer));
  }
  if (any_factored) stepper_.set_update_listener(this);
}

template <class T>
void DenseRecorder<T>::on_thin_update(Index layer, MatrixRef<const T> left,
                                      MatrixRef<const T> right, const GradientStep<T>& step,
                                      const Context& context) {
  LowRankDrift<T>* factored = layers_[static_cast<std::size_t>(layer)].factored.get();
  if (factored == nullptr || !factored->is_closed()) return;
  factored->descend(static_cast<double>(step.scale), static_cast<double>(step.learning_rate),
                    static_cast<double>(step.weight_decay), static_cast<double>(step.momentum),
                    left, right, context);
}

template <class T>
void DenseRecorder<T>::track(std::size_t l, Index record) {
  Layer& layer = layers_[l];
  const MatrixRef<T>& w = stepper_.weights()[l];
  const bool factored =
      layer.factored != nullptr && layer.factored->flush(context_) &&
      layer.factored->truncated() <= isometry_tolerance<T> * layer.factored->isometry().scale;
  const TrackerRecord& r = factored ? layer.tracker.update(*layer.factored, context_)
                                    : layer.tracker.update(w, layer.drift, context_);
  if (!factored) layer.factored.reset();
  layer.largest = r.values[0] + r.errors[0];
  layer.drift = 0.0;

  const Index k = records_.values[l].shape[1];
  const auto copy_to_record = [&](const auto& from, const auto& to) {
    using Item = std::remove_reference_t<decltype(*to.data)>;
    std::transform(from.begin(), from.end(), to.data + record * k,
                   [](auto x) { return static_cast<Item>(x); });
  };
  copy_to_record(r.values, records_.values[l]);
  copy_to_record(r.errors, records_.errors[l]);
  for (Index i = record * k; i < (record + 1) * k; ++i) {  // those of the values as they are stored
    const double stored = static_cast<double>(records_.values[l].data[i]);
    records_.errors[l].data[i] += std::abs(stored - r.values[i - record * k]);
  }
  copy_to_record(r.signs, records_.signs[l]);
  copy_to_record(r.branches, records_.branches[l]);
  copy_to_record(r.clusters, records_.clusters[l]);
  double* column = records_.tracking[l].data + record * n_tracking_columns;
  column[column_tier] = static_cast<double>(r.tier);
  column[column_completeness] = static_cast<double>(r.completeness);
  column[column_refreshed] = r.refreshed ? 1.0 : 0.0;
  column[column_norm] = r.norm;
  column[column_tail] = r.tail;
  column[column_drift] = r.drift;
  column[column_vector_error] = r.vector_error;
  column[column_truncated] = r.truncated;
  column[column_orthogonality] = r.orthogonality;
  column[column_overlap] = r.overlap;
  column[column_rho] = r.rho;
  column[column_rho_spread] = r.rho_spread;
  column[column_multiplicity] = static_cast<double>(r.multiplicity);
  column[column_seconds] = r.seconds;
  if (!records_.left.empty()) {
    const MatrixRef<T> left(records_.left[l].data + record * w.rows * k, w.rows, k);
    const MatrixRef<T> right(records_.right[l].data + record * w.cols * k, w.cols, k);
    left.map() = layer.tracker.left().map().transpose();
    right.map() = layer.tracker.right().map().transpose();
  }
}

template <class T>
void DenseRecorder<T>::record(Index record, Index /*step*/) {
  // Needed even without layers to track: weights that the caller reads after a record must be
  // current.
  stepper_.weights();
  for (std::size_t l = 0; l < layers_.size(); ++l) track(l, record);
}

// With the loss c/2 || (W_{L:1} - M*) S^{1/2} ||_F^2 + floor, || W_{L:1} S - Phi ||_F is at most
// sqrt(2 (loss - floor) || S || / c). For measurements, with the loss c/2 || r ||^2, the same
// bounds || B^T r || with || B ||^2 instead of || S ||.
template <class T>
void DenseRecorder<T>::bound_drift(Index step, double loss) {
  if (rates_.optimizer) {  // nothing is known
    for (Layer& layer : layers_) layer.drift = infinity;
    return;
  }
  constexpr double rounding = sizeof(T) == 8 ? 1e-9 : 1e-3;
  const double excess = std::max(loss - objective_.loss_floor, 0.0) + rounding * std::abs(loss);
  const double c = objective_.loss_scale;
  const double error = std::sqrt(2.0 * excess * gram_norm_ / c);
  std::vector<double> moved(layers_.size());
  // The product of the largest values of all other layers, from the left and from the right: linear
  // in the number of layers, and no division.
  std::vector<double> above(layers_.size(), 1.0);
  for (std::size_t l = layers_.size() - 1; l > 0; --l) above[l - 1] = above[l] * layers_[l].largest;
  double below = c * error;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Layer& layer = layers_[l];
    double gradient = below * above[l];
    if (std::isnan(gradient)) gradient = infinity;  // one factor overflows, the other underflows
    below *= layer.largest;
    const Index i = static_cast<Index>(l);
    layer.velocity = rates_.momentum_at(step, i) * layer.velocity +
                     rates_.weight_decay_at(step, i) * layer.largest + gradient;
    moved[l] =
        rates_.learning_rate_at(step, i) * stepper_.rate() * layer.velocity * (1.0 + rounding);
  }
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    layers_[l].drift += moved[l];
    layers_[l].largest += moved[l];
  }
}

template <class T>
void DenseRecorder<T>::after_step(Index step, double loss, bool last) {
  if (!layers_.empty() && !last) bound_drift(step, loss);
  if (records_.snapshot_every == 0 || step % records_.snapshot_every != 0) return;
  const Index snapshot = *records_.n_snapshots;
  const std::vector<MatrixRef<T>>& weights = stepper_.weights();
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const MatrixRef<T>& w = weights[l];
    const MatrixRef<T> out(records_.snapshots[l].data + snapshot * w.rows * w.cols, w.rows, w.cols);
    out.map() = w.map();
  }
  *records_.n_snapshots = snapshot + 1;
}

template <class T>
ReducedRecorder<T>::ReducedRecorder(const ReducedDescent<T>& stepper, ReducedRecords<T> records,
                                    const Schedule& schedule)
    : stepper_(stepper), records_(std::move(records)) {
  const std::vector<MatrixRef<T>>& cores = stepper.cores();
  const Index n = n_records(schedule);
  require_length(static_cast<Index>(records_.cores.size()), static_cast<Index>(cores.size()),
                 "core_records");
  for (std::size_t l = 0; l < cores.size(); ++l) {
    require_room(records_.cores[l], n, {cores[l].rows, cores[l].cols},
                 "core_records[" + std::to_string(l) + "]");
  }
  require_room(records_.rho, n, {static_cast<Index>(stepper.rho().size())}, "rho_records");
}

template <class T>
void ReducedRecorder<T>::record(Index record, Index /*step*/) {
  for (std::size_t l = 0; l < records_.cores.size(); ++l) {
    const auto& [data, shape] = records_.cores[l];
    stepper_.copy_core(static_cast<Index>(l), data + record * shape[1] * shape[2]);
  }
  const std::vector<double>& rho = stepper_.rho();
  std::copy(rho.begin(), rho.end(), records_.rho.data + record * static_cast<Index>(rho.size()));
}

template class DenseRecorder<float>;
template class DenseRecorder<double>;
template class ReducedRecorder<float>;
template class ReducedRecorder<double>;

}  // namespace dlnfast
