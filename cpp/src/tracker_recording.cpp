// SPDX-License-Identifier: MIT
#include "tracker_recording.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "numbers.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Returns the largest entry of |x x^T - 1|.
template <class T>
double departure_from_orthonormal(const Matrix<T>& x, const Context& context) {
  Matrix<T> gram(x.rows(), x.rows());
  multiply<T>(view(x), Op::none, view(x), Op::transpose, MatrixRef<T>(gram), context);
  gram.diagonal().array() -= T(1);
  return gram.size() > 0 ? static_cast<double>(gram.cwiseAbs().maxCoeff()) : 0.0;
}

}  // namespace

template <class T>
void TrackerRecording<T>::start_record(double squared_norm, Clock::time_point start) {
  start_ = start;
  const auto k = static_cast<std::size_t>(subspace_.shape().k);
  record_.update = count_;
  record_.refreshed = false;
  record_.n_columns = 0;
  record_.errors.assign(k, infinity);
  record_.truncated = 0.0;
  record_.norm = squared_norm >= 0.0 ? std::sqrt(squared_norm) : nan;
  record_.vector_error = nan;
  record_.rho = record_.rho_spread = nan;
  record_.multiplicity = 0;
  record_.left_angles.assign(k, nan);
  record_.right_angles = record_.left_angles;
  record_.left_block = record_.right_block = {nan, nan};
}

// Returns the errors of all p values. Guards get the error of the last reported value.
template <class T>
std::vector<double> TrackerRecording<T>::all_errors() const {
  const Index k = subspace_.shape().k, p = subspace_.size();
  std::vector<double> errors(static_cast<std::size_t>(p), subspace_.rounding_bound());
  std::copy(record_.errors.begin(), record_.errors.end(), errors.begin());
  for (Index i = k; i < p; ++i) errors[i] = errors[k - 1];
  return errors;
}

template <class T>
void TrackerRecording<T>::finish(double drift, double max_distance, const Context& context) {
  if (!settings_.follow) return finish_values(drift);
  SingularPairs<T>& pairs = subspace_.reported();
  follow(branches_, max_distance, MatrixRef<T>(pairs.left), MatrixRef<T>(pairs.right), context);
  record_.orthogonality = departure_from_orthonormal(pairs.left, context);
  if (settings_.measure_angles) {
    record_.orthogonality =
        std::max(record_.orthogonality, departure_from_orthonormal(pairs.right, context));
  }
  complete(drift);
}

template <class T>
void TrackerRecording<T>::finish_in_frames(MatrixRef<double> left, MatrixRef<double> right,
                                           const Context& context) {
  follow(frame_branches_, infinity, left, right, context);
  record_.orthogonality = 0.0;
  complete(0.0);
}

template <class T>
void TrackerRecording<T>::finish_values(double drift) {
  const auto k = static_cast<std::size_t>(subspace_.shape().k);
  record_.branches.assign(k, -1);
  record_.signs.assign(k, 1.0);
  record_.clusters = find_clusters(subspace_.reported().values, all_errors(),
                                   settings_.branches.cluster_tolerance);
  record_.clusters.resize(k);
  record_.orthogonality = 0.0;
  complete(drift);
}

template <class T>
template <class S>
void TrackerRecording<T>::follow(Branches<S>& branches, double max_distance, MatrixRef<S> left,
                                 MatrixRef<S> right, const Context& context) {
  const Index k = subspace_.shape().k;
  branches.follow(subspace_.reported().values, all_errors(), max_distance, left, right, context);
  // A single cluster determines no directions to measure angles from.
  if (!branches.has_reference() && subspace_.size() > 0 && branches.clusters().back() > 0) {
    branches.set_reference();
  }
  has_vectors_ = true;
  const auto first_k = [&](auto list) {
    list.resize(static_cast<std::size_t>(k));
    return list;
  };
  record_.branches = first_k(branches.ids());
  record_.clusters = first_k(branches.clusters());
  record_.signs = first_k(branches.signs());
  const auto overlaps = first_k(branches.overlaps());
  record_.overlap = *std::min_element(overlaps.begin(), overlaps.end());
  if (!settings_.measure_angles) return;
  record_.left_angles = first_k(branches.angles(true));
  record_.right_angles = first_k(branches.angles(false));
  record_.left_block = branches.block_angle(true, k, context);
  record_.right_block = branches.block_angle(false, k, context);
}

// Sets values, gaps and time.
template <class T>
void TrackerRecording<T>::complete(double drift) {
  const Index k = subspace_.shape().k, p = subspace_.size();
  const std::vector<double>& s = subspace_.reported().values;
  record_.values.assign(s.begin(), s.begin() + k);
  record_.gaps.assign(static_cast<std::size_t>(k), infinity);
  for (Index i = 0; i < k; ++i) {
    if (i > 0) record_.gaps[i] = s[i - 1] - s[i];
    if (i + 1 < p) record_.gaps[i] = std::min(record_.gaps[i], s[i] - s[i + 1]);
  }
  record_.drift = drift;
  ++count_;
  record_.seconds = std::chrono::duration<double>(Clock::now() - start_).count();
}

template <class T>
void TrackerRecording<T>::leave_frames() {
  SingularPairs<T>& pairs = subspace_.reported();
  branches_.continue_from(frame_branches_, MatrixRef<T>(pairs.left), MatrixRef<T>(pairs.right));
}

template <class T>
void TrackerRecording<T>::set_reference() {
  if (record_.tier == Tier::factored) {
    frame_branches_.set_reference();
  } else {
    branches_.set_reference();
  }
}

template <class T>
void TrackerRecording<T>::set_reference(MatrixRef<const T> left, MatrixRef<const T> right) {
  require_shape(left, left.rows, subspace_.shape().m, "the reference's left vectors");
  require_shape(right, left.rows, subspace_.shape().n, "the reference's right vectors");
  branches_.set_reference(left, right);
}

template class TrackerRecording<float>;
template class TrackerRecording<double>;

}  // namespace dlnfast
