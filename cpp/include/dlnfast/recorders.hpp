// SPDX-License-Identifier: MIT
// What a run keeps at its records, written to arrays of the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dlnfast/dense_descent.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/svd_tracker.hpp"

namespace dlnfast {

// What a record says of a layer beside its singular values, one number each.
enum TrackingColumn : Index {
  column_tier,
  column_completeness,
  column_refreshed,
  column_norm,
  column_tail,
  column_drift,
  column_vector_error,
  column_truncated,
  column_orthogonality,
  column_overlap,
  column_rho,
  column_rho_spread,
  column_multiplicity,
  column_seconds,
  n_tracking_columns
};
inline constexpr const char* tracking_column_names[n_tracking_columns] = {
    "tier",      "completeness",  "refreshed", "norm", "tail",       "drift",        "vector_error",
    "truncated", "orthogonality", "overlap",   "rho",  "rho_spread", "multiplicity", "seconds"};

// Arrays with a leading axis of records (snapshots: of snapshots), one per layer; an empty list
// keeps nothing.
template <class T>
struct DenseRecords {
  std::vector<Index> n_values;
  std::vector<T*> values;       // n_values[l]
  std::vector<double*> errors;  // n_values[l]; as values, as are the next three
  std::vector<double*> signs;
  std::vector<std::int64_t*> branches;
  std::vector<std::int64_t*> clusters;
  std::vector<double*> tracking;  // n_tracking_columns
  std::vector<T*> left;           // d_l x n_values[l]
  std::vector<T*> right;          // d_{l-1} x n_values[l]
  std::vector<T*> snapshots;      // d_l x d_{l-1}, at steps 0, snapshot_every, ..
  Index snapshot_every = 0;
  std::int64_t* n_snapshots = nullptr;
};

// How singular values are followed; k and `follow` are the recorder's.
template <class T>
struct Tracking {
  TrackerSettings settings;
  bool factored = true;  // where a layer's updates are thin and W(0) is an isometry
  Index record_every =
      1;  // steps: the rarer events are, the more of their time certificates may take
  std::vector<MatrixRef<const T>> initial;  // W_l(0), for that; empty: none
  std::vector<double> velocity;  // norms of what the layers' velocities start from; empty: zeros
};

// Follows the singular values of every layer (svd_tracker.hpp): in factored form where the updates are,
// otherwise from the weights, with the loss as a bound on how far they drift: || G_l ||_2 is at most
// c || W_{L:1} S - Phi ||_F times the largest singular values of the other layers.
template <class T>
class DenseRecorder final : public Recorder, private UpdateWatcher<T> {
 public:
  DenseRecorder(DenseDescent<T>& stepper, DenseRecords<T> records, Tracking<T> tracking,
                const Objective<T>& objective, const Rates& rates, const Context& context);
  ~DenseRecorder() override;
  DenseRecorder(const DenseRecorder&) = delete;
  DenseRecorder& operator=(const DenseRecorder&) = delete;

  void record(Index record, Index step) override;
  void after_step(Index step, double loss, bool last) override;

 private:
  // What is known of a layer between two records.
  struct Layer {
    SvdTracker<T> tracker;
    std::unique_ptr<LowRankDrift<T>> factored;
    double largest = 0.0;   // bound on its largest singular value
    double velocity = 0.0;  // bound on the norm of its velocity
    double drift = 0.0;     // bound on how far it has moved since its last record
  };

  void thin_update(Index layer, MatrixRef<const T> left, MatrixRef<const T> right,
                   const Descent<T>& descent, const Context& context) override;
  void start();
  void track(std::size_t layer, Index record);
  void bound_drift(double loss);

  DenseDescent<T>& stepper_;
  DenseRecords<T> records_;
  Tracking<T> tracking_;
  Objective<T> objective_;
  Rates rates_;
  Context context_;
  double gram_norm_ = 1.0;  // bound on ||S||_2, or on ||B||_2^2
  std::vector<Layer> layers_;
};

template <class T>
struct ReducedRecords {
  std::vector<Index> core_sizes;
  std::vector<T*> cores;  // a_l x a_{l-1}
  double* rho = nullptr;  // L
};

template <class T>
class ReducedRecorder final : public Recorder {
 public:
  ReducedRecorder(const ReducedDescent<T>& stepper, ReducedRecords<T> records)
      : stepper_(stepper), records_(std::move(records)) {}
  void record(Index record, Index step) override;

 private:
  const ReducedDescent<T>& stepper_;
  ReducedRecords<T> records_;
};

extern template class DenseRecorder<float>;
extern template class DenseRecorder<double>;
extern template class ReducedRecorder<float>;
extern template class ReducedRecorder<double>;

}  // namespace dlnfast
