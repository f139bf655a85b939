// SPDX-License-Identifier: MIT
// Recorders: they write the records of a run to arrays of the caller.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dlnfast/dense_descent.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/svd_tracker.hpp"

namespace dlnfast {

// Columns of a record of a layer besides its singular values, one number each.
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

// Arrays with a leading axis of records (`snapshots`: of snapshots), one per layer. Nothing is recorded for
// an empty list.
template <class T>
struct DenseRecords {
  std::vector<Index> n_values;
  std::vector<T*> values;       // n_values[l]
  std::vector<double*> errors;  // n_values[l], as the next three
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

// Settings of the trackers of a run. The recorder sets n_values and follow itself.
template <class T>
struct Tracking {
  TrackerSettings settings;
  bool factored = true;  // use the factored form where updates are thin and W(0) is an isometry
  Index record_every =
      1;  // steps from record to record: certificates may take a share of their time
  std::vector<MatrixRef<const T>> initial;  // W_l(0), for the factored form; empty: none
  std::vector<double> velocity;             // norms of the layers' initial velocities; empty: zeros
};

// Follows the singular values of every layer (svd_tracker.hpp): in factored form where the updates are thin,
// otherwise from the weights. The loss bounds how far the weights move between records:
//
//   || G_l ||_2 <= c || W_{L:1} S - Phi ||_F prod_{j != l} sigma_1(W_j).
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
  // State of a layer between two records.
  struct Layer {
    SvdTracker<T> tracker;
    std::unique_ptr<LowRankDrift<T>> factored;
    double largest = 0.0;   // bound on its largest singular value
    double velocity = 0.0;  // bound on the norm of its velocity
    double drift = 0.0;     // bound on the norm of its change since its last record
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
