// SPDX-License-Identifier: MIT
// Bindings of gradient descent: runs of the dense and the reduced engine, batches of runs, gradients.
#include "define.hpp"
#include "dlnfast/build_info.hpp"
#include "dlnfast/recorders.hpp"

namespace dlnfast::python {
namespace {

// A run of either engine: where its progress goes, and the functions that it calls.
struct Run {
  Rates rates;
  Schedule schedule;
  ProgressArrays arrays;
  int n_threads = 0;
  py::object on_record, on_progress, on_flush;
  DLNFAST_FIELDS("Run", rates, schedule, arrays, n_threads, on_record, on_progress, on_flush)
};

template <class T>
struct DenseArguments {
  Objective<T> objective;
  Run run;
  OptimizerState<T> state;
  DenseRecords<T> records;
  Tracking<T> tracking;
  DLNFAST_FIELDS("DenseArguments", objective, run, state, records, tracking)
};

template <class T>
struct ReducedArguments {
  Objective<T> objective;
  Run run;
  OptimizerState<T> state;
  std::vector<Family> families;
  MatrixRef<double> scalars;
  std::vector<ArrayRef<T, 3>> core_records;
  ArrayRef<double, 2> rho_records;
  DLNFAST_FIELDS("ReducedArguments", objective, run, state, families, scalars, core_records,
                 rho_records)
};

template <class T>
struct BatchArguments {
  Batch<T> batch;
  Index steps = 0, record_every = 1;
  double tolerance = -1.0;
  int n_threads = 0;
  BatchRecords<T> records;
  DLNFAST_FIELDS("BatchArguments", batch, steps, record_every, tolerance, n_threads, records)
};

template <class T>
Result dense(const std::vector<MatrixRef<T>>& weights, const DenseArguments<T>& d) {
  const auto& [rates, schedule, arrays, n_threads, on_record, on_progress, on_flush] = d.run;
  Monitor monitor = make_monitor(on_record, on_progress, on_flush);
  const Context context{n_threads, &monitor};
  const Progress progress = start_progress(arrays, schedule, rates);
  DenseRecords<T> records = d.records;
  records.n_snapshots = arrays.counts.data + count_snapshots;
  DenseDescent<T> stepper(weights, d.objective, rates, context, small_limit, d.state);
  DenseRecorder<T> recorder(stepper, records, d.tracking, d.objective, rates, schedule, context);
  return descend(stepper, recorder, schedule, progress, monitor);
}

template <class T>
Result reduced(const std::vector<MatrixRef<T>>& cores, const ReducedArguments<T>& d) {
  const auto& [rates, schedule, arrays, n_threads, on_record, on_progress, on_flush] = d.run;
  Monitor monitor = make_monitor(on_record, on_progress, on_flush);
  const Progress progress = start_progress(arrays, schedule, rates);
  ReducedDescent<T> stepper(cores, d.objective, d.families, rates, Context{n_threads, &monitor},
                            d.state, d.scalars);
  ReducedRecorder<T> recorder(stepper, {d.core_records, d.rho_records}, schedule);
  return descend(stepper, recorder, schedule, progress, monitor);
}

template <class T>
std::vector<Result> batch(const std::vector<Stack<const T>>& cores, const BatchArguments<T>& d) {
  Batch<T> batch = d.batch;
  batch.cores = cores;
  Monitor monitor = make_monitor();
  return batch_descent<T>(batch, {d.steps, d.record_every, d.tolerance}, d.records,
                          Context{d.n_threads, &monitor});
}

py::dict describe_tables() {
  py::dict tables;
  describe<BuildInfo>(tables);
  describe<GradientStep<float>>(tables);
  describe<TrackerSettings>(tables);
  describe<TrackerRecord, true>(tables);
  describe<Optimizer>(tables);
  describe<DenseArguments<float>>(tables);
  describe<Family>(tables);
  describe<ReducedArguments<float>>(tables);
  describe<FamilySpan>(tables);
  describe<BatchArguments<float>>(tables);
  return tables;
}

}  // namespace

void bind_descent(py::module_& m) {
  define(m, "dense_descent", "weights, arguments",
         "Gradient descent on whole matrices, in place; returns (outcome, step, layer).",
         dense<float>, dense<double>);
  define(m, "reduced_descent", "cores, arguments",
         "Gradient descent on cores and scalars; returns (outcome, step, layer).", reduced<float>,
         reduced<double>);
  define(m, "batch_descent", "cores, arguments",
         "Descent of many reduced runs of equal shape; returns (outcome, step, layer) of each.",
         batch<float>, batch<double>);
  define(m, "gradients", "weights, objective, gradients, n_threads",
         "Writes the gradient of the loss with respect to each layer; returns the loss.",
         compute_gradients<float>, compute_gradients<double>);
  define(
      m, "best_pivot", "widths", "Where the dense engine splits the chain of products.",
      +[](const std::vector<Index>& widths) { return best_pivot(widths); });
  define(
      m, "step_flops", "widths, pivot", "Flops of one dense step with that pivot.",
      +[](const std::vector<Index>& widths, Index pivot) { return step_flops(widths, pivot); });
  m.def("describe_tables", &describe_tables,
        "{name: (included tables, {field: annotation})} of the dictionaries that functions take.");
}

}  // namespace dlnfast::python
