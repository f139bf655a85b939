// SPDX-License-Identifier: MIT
// Recorders: write the records of a run to the caller's arrays.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dlnfast/dense_descent.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/svd_tracker.hpp"

namespace dlnfast {

// Scalars in each record of a layer, in addition to the singular values.
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

// Arrays with a leading axis of records (`snapshots`: of snapshots), one per layer. An empty list
// records nothing.
template <class T>
struct DenseRecords {
  std::vector<ArrayRef<T, 2>> values;                         // k_l, at most min(d_l, d_{l-1})
  std::vector<ArrayRef<double, 2>> errors, signs;             // k_l
  std::vector<ArrayRef<std::int64_t, 2>> branches, clusters;  // k_l
  std::vector<ArrayRef<double, 2>> tracking;                  // n_tracking_columns
  std::vector<ArrayRef<T, 3>> left, right;                    // d_l x k_l, d_{l-1} x k_l
  std::vector<ArrayRef<T, 3>> snapshots;  // d_l x d_{l-1}, at steps 0, snapshot_every, ..
  Index snapshot_every = 0;
  std::int64_t* n_snapshots = nullptr;
  DLNFAST_FIELDS("DenseRecords", values, errors, signs, branches, clusters, tracking, left, right,
                 snapshots, snapshot_every)
};

// Settings of a run's trackers. The recorder sets `n_values` and `follow`.
template <class T>
struct Tracking {
  std::optional<TrackerSettings> tracker;  // none: the defaults
  bool factored = true;  // allow the factored form for thin updates and isometric W(0)
  std::vector<MatrixRef<const T>> initial;  // W_l(0), for the factored form; may be empty
  std::vector<double> velocity_norms;       // of the layers' initial velocities; empty: zeros
  DLNFAST_FIELDS("Tracking", tracker, factored, initial, velocity_norms)
};

// Tracks the singular values of every layer (svd_tracker.hpp): in factored form where the updates
// are thin, otherwise from the weights. The loss bounds the change of the weights between records:
//
//   || G_l ||_2 <= c || W_{L:1} S - Phi ||_F prod_{j != l} sigma_1(W_j).
template <class T>
class DenseRecorder final : public Recorder, private UpdateListener<T> {
 public:
  DenseRecorder(DenseDescent<T>& stepper, DenseRecords<T> records, Tracking<T> tracking,
                const Objective<T>& objective, const Rates& rates, const Schedule& schedule,
                const Context& context);
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

  void on_thin_update(Index layer, MatrixRef<const T> left, MatrixRef<const T> right,
                      const GradientStep<T>& step, const Context& context) override;
  void check_records(const Schedule& schedule) const;
  void start(Index record_every);
  void track(std::size_t layer, Index record);
  void bound_drift(Index step, double loss);

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
  std::vector<ArrayRef<T, 3>> cores;  // n_records x a_l x a_{l-1}
  ArrayRef<double, 2> rho;            // n_records x L
};

template <class T>
class ReducedRecorder final : public Recorder {
 public:
  ReducedRecorder(const ReducedDescent<T>& stepper, ReducedRecords<T> records,
                  const Schedule& schedule);
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
