// SPDX-License-Identifier: MIT
#include "factored_tier.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "dlnfast/basis.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "numbers.hpp"
#include "small_decomposition.hpp"
#include "tail_bounds.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Largest number of frame vectors. Their coordinates come first, then those of the complement.
constexpr Index max_frame_size = 256;

// Returns |s| eps.
template <class T>
double shared_value(const LowRankDrift<T>& drift) {
  return std::abs(drift.initial_factor()) * drift.isometry().scale;
}

}  // namespace

template <class T>
void FactoredTier<T>::check(const LowRankDrift<T>& drift) {
  if (!drift.is_closed()) {
    throw std::invalid_argument("the frames of the factored form are not closed");
  }
  const Index size = std::max(drift.left_frame().rows, drift.right_frame().rows);
  if (size > max_frame_size) {
    throw ShapeError("frames of " + std::to_string(size) + " vectors; wanted at most " +
                     std::to_string(max_frame_size));
  }
}

template <class T>
double FactoredTier<T>::squared_norm(const LowRankDrift<T>& drift, const Matrix<double>& core,
                                     Index smaller) {
  const Index n_complement = smaller - std::min(core.rows(), core.cols());
  return core.squaredNorm() + static_cast<double>(n_complement) * square(shared_value(drift));
}

template <class T>
bool FactoredTier<T>::update(const LowRankDrift<T>& drift, const Matrix<double>& core,
                             TrackerRecord& record, const Context& context) {
  const Index k = subspace_.shape().k, p = subspace_.size();
  const Index n_core = std::min(core.rows(), core.cols());
  const Index n_complement = subspace_.shape().smaller - n_core;
  const double rho = shared_value(drift);
  record.tier = Tier::factored;
  record.truncated = drift.truncated();
  record.rho = rho;
  record.rho_spread = 2.0 * rho * drift.isometry().departure;
  record.multiplicity = n_complement;

  const std::vector<Entry> entries = sorted_entries(core, rho, n_complement, context);
  const double rounding_bound = subspace_.rounding_bound();
  const double error =
      drift.truncated() + rho * drift.isometry().departure + rounding_bound;  // (3)
  std::vector<double>& values = subspace_.reported().values;
  values.assign(static_cast<std::size_t>(p), 0.0);
  for (Index i = 0; i < p; ++i) values[i] = entries[i].value;
  for (Index i = 0; i < k; ++i) record.errors[i] = error;
  const Completeness kind =
      drift.isometry().rigorous ? Completeness::rigorous : Completeness::probabilistic;
  record.completeness =
      is_within(settings_.tolerance, error, values[0], rounding_bound) ? kind : Completeness::none;
  record.tail = (k < static_cast<Index>(entries.size()) ? entries[k].value : 0.0) + error;

  if (!settings_.follow || p > thin_limit) return false;
  drift_ = &drift;
  has_complement_ = has_complement_ && complement_frame_ == n_core;
  complement_frame_ = n_core;
  set_coordinates(entries, drift.initial_factor() < 0.0 ? -1.0 : 1.0);
  has_vectors_ = false;
  return true;
}

// Returns (1) and (2) in descending order: all values of the core, and up to p of the complement.
// At least p.
template <class T>
auto FactoredTier<T>::sorted_entries(const Matrix<double>& core, double rho, Index n_complement,
                                     const Context& context) -> std::vector<Entry> {
  const TrackerShape& shape = subspace_.shape();
  const Index p = subspace_.size();
  std::vector<Entry> entries;
  double largest = n_complement > 0 ? rho : 0.0;
  if (n_complement < shape.smaller) {
    const SmallDecomposition d(core, context);
    safe_assign_both(core_left_, d.a.transpose(), core_right_, d.b.transpose());
    for (Index i = 0; i < shape.smaller - n_complement; ++i) entries.push_back({d.s(0, i), i});
    largest = std::max(d.s(0, 0), largest);
  }
  subspace_.set_rounding_bound(largest);
  for (Index i = 0; i < std::min(n_complement, p); ++i) entries.push_back({rho, -1 - i});
  std::stable_sort(entries.begin(), entries.end(),
                   [](const Entry& a, const Entry& b) { return a.value > b.value; });
  return entries;
}

// `sign` is that of W_0 in W: W maps a direction of the complement to sign rho times its partner.
template <class T>
void FactoredTier<T>::set_coordinates(const std::vector<Entry>& entries, double sign) {
  const Index p = subspace_.size();
  const Matrix<double> none = Matrix<double>::Zero(p, max_frame_size + p);
  safe_assign_both(coordinates_left_, none, coordinates_right_, none);
  for (Index i = 0; i < p; ++i) {
    const Index index = entries[i].index;
    if (index >= 0) {
      coordinates_left_.row(i).head(core_left_.cols()) = core_left_.row(index);
      coordinates_right_.row(i).head(core_right_.cols()) = core_right_.row(index);
    } else {
      coordinates_left_(i, max_frame_size - 1 - index) = sign;
      coordinates_right_(i, max_frame_size - 1 - index) = 1.0;
    }
  }
}

template <class T>
void FactoredTier<T>::compute_vectors(const Context& context) {
  if (has_vectors_ || drift_ == nullptr) return;
  subspace_.allocate();
  if (!has_complement_) compute_complement(context);
  SingularPairs<T>& pairs = subspace_.reported();
  combine(coordinates_left_, drift_->left_frame(), complement_left_, pairs.left, context);
  combine(coordinates_right_, drift_->right_frame(), complement_right_, pairs.right, context);
  has_vectors_ = true;
}

// Computes random directions outside the frames, on the side on which W_0 is an isometry, and their
// images.
template <class T>
void FactoredTier<T>::compute_complement(const Context& context) {
  const Index m = subspace_.shape().m, n = subspace_.shape().n;
  const MatrixRef<const T> left_frame = drift_->left_frame(), right_frame = drift_->right_frame();
  const T inverse = static_cast<T>(1.0 / drift_->isometry().scale);
  const Index size = std::min({subspace_.size(), n - right_frame.rows, m - left_frame.rows});
  safe_resize(complement_right_, size, n);
  safe_resize(complement_left_, size, m);
  const bool is_tall = n <= m;
  Matrix<T>& chosen = is_tall ? complement_right_ : complement_left_;
  Matrix<T>& image = is_tall ? complement_left_ : complement_right_;
  const MatrixRef<const T> frame = is_tall ? right_frame : left_frame;
  random_.fill(MatrixRef<T>(chosen));
  for (int pass = 0; pass < 2; ++pass) {
    project_out<T>(chosen, frame, context);
    orthonormalize<T>(chosen, random_, context);
  }
  if (is_tall) {
    block_times_transpose<T>(MatrixRef<T>(chosen), drift_->initial(), MatrixRef<T>(image), context);
  } else {
    block_times<T>(MatrixRef<T>(chosen), drift_->initial(), MatrixRef<T>(image), context);
  }
  image *= inverse;
  has_complement_ = true;
}

// vectors = coordinates times (frame, complement).
template <class T>
void FactoredTier<T>::combine(const Matrix<double>& coordinates, MatrixRef<const T> frame,
                              const Matrix<T>& complement, Matrix<T>& vectors,
                              const Context& context) const {
  const Index p = subspace_.size();
  // The frame may have grown since the update, even beyond max_frame_size; the new vectors have no
  // coordinates.
  frame = frame.block(0, 0, std::min(frame.rows, max_frame_size), frame.cols);
  const Matrix<T> inside = coordinates.leftCols(frame.rows).template cast<T>();
  const Matrix<T> outside =
      coordinates.middleCols(max_frame_size, complement.rows()).template cast<T>();
  vectors.setZero();
  if (frame.rows > 0) {
    multiply<T>(top(inside, p), Op::none, frame, Op::none, MatrixRef<T>(vectors), context);
  }
  if (complement.rows() > 0) {
    multiply<T>(T(1), top(outside, p), Op::none, view(complement), Op::none, T(1),
                MatrixRef<T>(vectors), context);
  }
}

template class FactoredTier<float>;
template class FactoredTier<double>;

}  // namespace dlnfast
