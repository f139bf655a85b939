// SPDX-License-Identifier: MIT
// The dictionaries of the boundary that are no structs of the core.
#pragma once

#include "dlnfast/build_info.hpp"
#include "dlnfast/recorders.hpp"
#include "fields.hpp"

namespace dlnfast::python {

inline const TrackerSettings& checked(const TrackerSettings& settings) {
  if (settings.failure > 0.0 && settings.failure < 1.0) return settings;
  throw py::value_error("failure is not between 0 and 1");
}

struct BuildInfoTable : BuildInfo {
  int max_threads = 0;
  DLNFAST_FIELDS("BuildInfo", version, level, compiler, eigen, openmp, vector_bytes, max_threads)
};

// Statistics, or observations of the matrix itself.
template <class T>
struct ObjectiveTable {
  Objective<T> statistics;
  std::optional<ObservedEntries<T>> observed;
  std::optional<Measurements<T>> measurements;
  DLNFAST_FIELDS("Objective", statistics, observed, measurements)

  // Refers to this table.
  Objective<T> objective() const {
    Objective<T> objective = statistics;
    objective.observed = observed ? &*observed : nullptr;
    objective.measured = measurements ? &*measurements : nullptr;
    return objective;
  }
};

// A run of either engine: where its losses go, and the functions that it calls.
struct Run {
  Rates rates;
  std::optional<std::tuple<double, std::vector<double>, double>> adaptive;  // as AdaptiveRate
  Schedule schedule;
  int n_threads = 0;
  View<double, 1> loss, rate;
  View<std::int64_t, 1> record_steps, counts;
  py::object on_record, on_progress, on_flush;
  DLNFAST_FIELDS("Run", rates, adaptive, schedule, n_threads, loss, rate, record_steps, counts,
                 on_record, on_progress, on_flush)
};

template <class T>
struct State {
  std::vector<MatrixRef<T>> velocity, compensation;
  std::vector<View<T, 1>> power_vectors;
  DLNFAST_FIELDS("OptimizerState", velocity, compensation, power_vectors)
};

template <class T>
struct DenseTable {
  ObjectiveTable<T> objective;
  Run run;
  State<T> state;
  std::optional<Index> n_values;  // None: all
  Index snapshot_every = 0;
  // Records of each layer; empty lists record nothing.
  std::vector<View<T, 2>> values;
  std::vector<View<double, 2>> errors, signs, tracking;
  std::vector<View<std::int64_t, 2>> branches, clusters;
  std::vector<View<T, 3>> left, right, snapshots;
  Nested<TrackerSettings> tracker;
  bool factored = false;
  std::vector<double> velocity_norms;
  std::vector<MatrixRef<const T>> initial;
  DLNFAST_FIELDS("DenseArguments", objective, run, state, n_values, snapshot_every, values, errors,
                 signs, tracking, branches, clusters, left, right, snapshots, tracker, factored,
                 velocity_norms, initial)
};

template <class T>
struct ReducedTable {
  Objective<T> objective;
  Run run;
  State<T> state;
  // First layer from 0, multiplicity, coupling, initial scalars.
  std::vector<std::tuple<Index, double, double, std::vector<double>>> families;
  MatrixRef<double> scalars;
  std::vector<View<T, 3>> core_records;
  View<double, 2> rho_records;
  DLNFAST_FIELDS("ReducedArguments", objective, run, state, families, scalars, core_records,
                 rho_records)
};

template <class T>
struct BatchTable {
  Batch<T> batch;
  std::vector<std::tuple<Index, Index>> families;  // first layer from 0, number of layers
  Index steps = 0, record_every = 1;
  double tolerance = -1.0;
  int n_threads = 0;
  MatrixRef<double> loss;
  std::vector<View<T, 4>> core_records;
  Stack<double> rho_records;
  MatrixRef<std::int64_t> counts;
  DLNFAST_FIELDS("BatchArguments", batch, families, steps, record_every, tolerance, n_threads, loss,
                 core_records, rho_records, counts)
};

}  // namespace dlnfast::python
