// SPDX-License-Identifier: MIT
// The tracker: chooses the tier of each update, in a unit in which W is of size 1, and records it.
// Its parts:
//
//   tracker_scale        the unit
//   subspace_iteration   vectors and sweeps
//   tail_bounds          errors; krylov_certificate, origin_bound: bounds on the complement
//   drift_meter          how far W has moved, if the caller does not know
//   dense_tier, full_tier, factored_tier
//   tracker_recording    records and branches
#include "dlnfast/svd_tracker.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "dense_tier.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/workspace.hpp"
#include "drift_meter.hpp"
#include "factored_tier.hpp"
#include "full_tier.hpp"
#include "numbers.hpp"
#include "subspace_iteration.hpp"
#include "tracker_recording.hpp"
#include "tracker_scale.hpp"

namespace dlnfast {
namespace {

TrackerShape checked_shape(Index m, Index n, const TrackerSettings& settings) {
  if (m < 1 || n < 1) {
    throw ShapeError("a matrix of shape (" + std::to_string(m) + ", " + std::to_string(n) +
                     ") has no singular values to track");
  }
  if (settings.n_values < 1) throw ShapeError("the number of singular values is below 1");
  if (settings.n_guards < 0) throw ShapeError("the number of guards is negative");
  if (!(settings.failure > 0.0 && settings.failure < 1.0)) {
    throw std::invalid_argument("failure is not between 0 and 1");
  }
  const Index smaller = std::min(m, n);
  return {m, n, smaller, std::min(settings.n_values, smaller)};
}

// Returns p: k values and the guards.
Index block_size(const TrackerShape& shape, Index n_guards) {
  return std::min(shape.k + std::min(n_guards, shape.smaller), shape.smaller);
}

}  // namespace

template <class T>
class SvdTracker<T>::Impl {
 public:
  using Clock = typename TrackerRecording<T>::Clock;

  Impl(Index m, Index n, const TrackerSettings& settings)
      : settings_(settings),
        shape_(checked_shape(m, n, settings)),
        random_(settings.seed + 1),
        subspace_(shape_, block_size(shape_, settings.n_guards), random_),
        dense_(settings, subspace_, random_),
        full_(settings, subspace_, scale_),
        factored_(settings, subspace_, random_),
        recording_(settings, subspace_),
        meter_(m, n, settings),
        is_decomposed_(FullTier<T>::is_chosen(settings.mode, shape_.smaller, subspace_.size())) {}

  const TrackerShape& shape() const { return shape_; }
  const TrackerRecord& record() const { return recording_.record(); }
  DenseTier<T>& dense() { return dense_; }
  SubspaceIteration<T>& subspace() { return subspace_; }
  TrackerRecording<T>& recording() { return recording_; }

  const TrackerRecord& update(const LinearOperator<T>& w, const MatrixRef<const T>* matrix,
                              double drift, const Context& context) {
    const auto start = Clock::now();
    require_shape(MatrixRef<const T>(nullptr, w.rows(), w.cols()), shape_.m, shape_.n, "W");
    if (matrix == nullptr && settings_.mode == TrackerMode::full) {
      throw std::invalid_argument("a full decomposition needs the matrix itself");
    }
    set_context(context);
    leave_factored();
    const bool is_full = matrix != nullptr && uses_full_tier(drift);
    const bool is_measured = matrix != nullptr && !is_full && !std::isfinite(drift);
    if (is_measured) {
      drift = meter_.measure(*matrix, recording_.count(), context_);
    } else {
      meter_.reset();
    }
    double moved;
    try {
      moved = measure(w, matrix, is_full, drift);
    } catch (...) {
      meter_.reset();  // the distance was not added to the drift
      throw;
    }
    recording_.start_record(squared_norm_, start);
    if (is_full) {
      full_.update(*matrix, recording_.record(), context_);
      dense_.tails().restart();
    } else {
      iterate(w, matrix);
    }
    if (is_measured) meter_.report(moved, subspace_.reported().values[0], record().update);
    recording_.finish(dense_.tails().drift(), moved, context_);
    scale_.convert(recording_.record());
    return record();
  }

  const TrackerRecord& update(const LowRankDrift<T>& drift, const Context& context) {
    const auto start = Clock::now();
    require_shape(drift.initial(), shape_.m, shape_.n, "W");
    FactoredTier<T>::check(drift);
    set_context(context);
    meter_.reset();
    const Matrix<double> core = drift.core();
    squared_norm_ = FactoredTier<T>::squared_norm(drift, core, shape_.smaller);
    recording_.start_record(squared_norm_, start);
    dense_.tails().restart();
    if (factored_.update(drift, core, recording_.record(), context_)) {
      recording_.finish_in_frames(factored_.left(), factored_.right(), context_);
    } else {
      recording_.finish_values(0.0);
    }
    return record();
  }

  // Returns the reported vectors (rows); absent if there are none.
  MatrixRef<const T> vectors(bool is_left) {
    if (!recording_.has_vectors()) return {};
    context_.monitor = nullptr;  // the monitor of the last update may have been destroyed
    factored_.compute_vectors(context_);
    const SingularPairs<T>& pairs = subspace_.reported();
    return {is_left ? pairs.left.data() : pairs.right.data(), shape_.k,
            is_left ? shape_.m : shape_.n};
  }

 private:
  // With an unknown drift, every update of the dense tier would need a certificate.
  bool uses_full_tier(double drift) const {
    return is_decomposed_ || (settings_.mode == TrackerMode::automatic &&
                              shape_.smaller <= largest_gram_size && !std::isfinite(drift));
  }

  void set_context(const Context& context) {
    context_ = context;
    context_.workspace = &workspace_;
  }

  // Switches from the factored form to W itself, starting from the vectors of the factored form.
  void leave_factored() {
    if (!factored_.is_active()) return;
    factored_.compute_vectors(context_);
    recording_.leave_frames();
    factored_.deactivate();
    subspace_.start_from_reported();
  }

  // Measures W and chooses the unit. Returns `drift` in this unit; infinity if it is unknown or the
  // unit changed.
  double measure(const LinearOperator<T>& w, const MatrixRef<const T>* matrix, bool is_full,
                 double drift) {
    double norm = dense_.origin().measure(is_full ? nullptr : matrix, recording_.count(), context_);
    if (!dense_.origin().is_compared()) norm = w.norm(context_);
    const bool is_matrix = matrix != nullptr;
    if (is_matrix && !std::isfinite(norm)) {
      throw std::domain_error("a matrix to track is not finite, or its norm overflows");
    }
    const bool has_unit_changed = scale_.choose(w, norm, is_matrix, random_, context_);
    if (has_unit_changed) dense_.reset_bounds();
    dense_.origin().set_unit(scale_.factor());
    squared_norm_ = std::isfinite(norm) ? square(norm * scale_.factor()) : -1.0;
    const double moved = drift >= 0.0 && !has_unit_changed ? drift * scale_.factor() : infinity;
    dense_.tails().add_drift(moved);
    return moved;
  }

  void iterate(const LinearOperator<T>& w, const MatrixRef<const T>* matrix) {
    const ScaledOperator<T> scaled = scale_.scaled(w);
    try {
      dense_.update(
          {scaled, matrix, scale_.factor(), squared_norm_, recording_.record(), context_});
    } catch (...) {
      dense_.reset();
      recording_.discard_vectors();
      throw;
    }
    recording_.record().vector_error = dense_.tails().vector_error(context_);
  }

  TrackerSettings settings_;
  TrackerShape shape_;
  Context context_;
  Workspace workspace_;
  Random random_;
  TrackerScale<T> scale_;
  SubspaceIteration<T> subspace_;
  DenseTier<T> dense_;
  FullTier<T> full_;
  FactoredTier<T> factored_;
  TrackerRecording<T> recording_;
  DriftMeter<T> meter_;
  bool is_decomposed_;          // matrices always use the full tier; operators use the dense tier
  double squared_norm_ = -1.0;  // ||W||_F^2 in this unit; negative: unknown
};

template <class T>
SvdTracker<T>::SvdTracker(Index rows, Index cols, const TrackerSettings& settings)
    : impl_(std::make_unique<Impl>(rows, cols, settings)) {}
template <class T>
SvdTracker<T>::~SvdTracker() = default;
template <class T>
SvdTracker<T>::SvdTracker(SvdTracker&&) noexcept = default;

template <class T>
Index SvdTracker<T>::rows() const {
  return impl_->shape().m;
}
template <class T>
Index SvdTracker<T>::cols() const {
  return impl_->shape().n;
}
template <class T>
Index SvdTracker<T>::n_values() const {
  return impl_->shape().k;
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(MatrixRef<const T> w, double drift,
                                           const Context& context) {
  return impl_->update(MatrixOperator<T>(w), &w, drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(const LinearOperator<T>& w, double drift,
                                           const Context& context) {
  return impl_->update(w, nullptr, drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(const LowRankDrift<T>& drift, const Context& context) {
  return impl_->update(drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::record() const {
  return impl_->record();
}
template <class T>
std::int64_t SvdTracker<T>::n_refreshes() const {
  return impl_->dense().n_refreshes();
}
template <class T>
std::int64_t SvdTracker<T>::n_certificates() const {
  return impl_->dense().n_certificates();
}
template <class T>
MatrixRef<const T> SvdTracker<T>::left() const {
  return impl_->vectors(true);
}
template <class T>
MatrixRef<const T> SvdTracker<T>::right() const {
  return impl_->vectors(false);
}
template <class T>
void SvdTracker<T>::set_origin(MatrixRef<const T> w) {
  require_shape(w, rows(), cols(), "the origin");
  impl_->dense().origin().set(w);
}
template <class T>
void SvdTracker<T>::seed(MatrixRef<const T> right, const Context& context) {
  impl_->subspace().seed(right, context);
}
template <class T>
void SvdTracker<T>::set_reference() {
  impl_->recording().set_reference();
}
template <class T>
void SvdTracker<T>::set_reference(MatrixRef<const T> left, MatrixRef<const T> right) {
  impl_->recording().set_reference(left, right);
}

template class SvdTracker<float>;
template class SvdTracker<double>;

}  // namespace dlnfast
