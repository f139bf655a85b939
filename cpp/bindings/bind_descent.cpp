// SPDX-License-Identifier: MIT
#include <memory>

#include "bindings.hpp"
#include "dlnfast/batch_descent.hpp"
#include "tables.hpp"

namespace dlnfast::python {
namespace {

std::string at(const char* name, std::size_t layer) {
  return std::string(name) + "[" + std::to_string(layer) + "]";
}

py::tuple as_tuple(const Result& result) {
  return py::make_tuple(names_of(result.outcome)[static_cast<std::size_t>(result.outcome)],
                        result.step, result.layer);
}

Rates rates_of(const Run& run) {
  Rates rates = run.rates;
  AdaptiveRate& adaptive = rates.adaptive;
  if (run.adaptive)
    std::tie(adaptive.safety, adaptive.curvature, adaptive.error_scale) = *run.adaptive;
  return rates;
}

Progress progress_of(const Run& run, const Rates& rates) {
  const Index n_rows = n_records(run.schedule);  // checks the schedule
  const Index n = n_losses(run.schedule);
  Progress p;
  p.loss = run.loss.room(n, {}, "loss");
  p.record_steps = run.record_steps.room(n_rows, {}, "record_steps");
  // A step follows every loss but the last.
  if (rates.adaptive.safety > 0.0) {
    p.rate = run.rate.room(run.schedule.flush_every > 0 ? n : n - 1, {}, "rate");
  }
  std::int64_t* counts = run.counts.room(n_counts, {}, "counts");
  std::fill(counts, counts + n_counts, 0);
  p.n_losses = counts + count_losses;
  p.n_records = counts + count_records;
  p.n_rates = counts + count_rates;
  p.between_steps = counts + count_between_steps;
  return p;
}

template <class T>
OptimizerState<T> state_of(const State<T>& table, const std::vector<MatrixRef<T>>& weights) {
  OptimizerState<T> state{table.velocity, table.compensation, {}};
  for (std::size_t l = 0; l < table.power_vectors.size(); ++l) {
    const View<T, 1>& vector = table.power_vectors[l];
    if (l >= weights.size() || vector.shape[0] != weights[l].cols) {
      throw py::value_error(at("power_vectors", l) + " has the wrong length");
    }
    state.power_vectors.push_back(vector.data);
  }
  return state;
}

template <class T>
DenseRecords<T> dense_records(const DenseTable<T>& d, const std::vector<MatrixRef<T>>& weights) {
  const Schedule& schedule = d.run.schedule;
  const Index n = n_records(schedule);
  DenseRecords<T> out;
  out.snapshot_every = d.snapshot_every;
  if (out.snapshot_every < 0) throw py::value_error("snapshot_every is negative");
  out.n_snapshots = d.run.counts.data + count_snapshots;
  const Index n_snapshots = out.snapshot_every > 0 ? n_multiples(schedule, out.snapshot_every) : 0;
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const Index m = weights[l].rows, k = weights[l].cols, all = std::min(m, k);
    const Index kept = std::clamp<Index>(d.n_values.value_or(all), 0, all);
    const auto room = [&](const auto& list, Index size, const auto& rest, const char* name) {
      return list.at(l).room(size, rest, at(name, l));
    };
    using Sizes = std::array<Index, 2>;
    if (!d.values.empty()) {
      const std::array<Index, 1> width{kept}, columns{n_tracking_columns};
      out.n_values.push_back(kept);
      out.values.push_back(room(d.values, n, width, "values"));
      out.errors.push_back(room(d.errors, n, width, "errors"));
      out.signs.push_back(room(d.signs, n, width, "signs"));
      out.branches.push_back(room(d.branches, n, width, "branches"));
      out.clusters.push_back(room(d.clusters, n, width, "clusters"));
      out.tracking.push_back(room(d.tracking, n, columns, "tracking"));
    }
    if (!d.left.empty()) {
      out.left.push_back(room(d.left, n, Sizes{m, kept}, "left"));
      out.right.push_back(room(d.right, n, Sizes{k, kept}, "right"));
    }
    if (n_snapshots > 0) {
      out.snapshots.push_back(room(d.snapshots, n_snapshots, Sizes{m, k}, "snapshots"));
    }
  }
  return out;
}

template <class T>
Tracking<T> tracking_of(const DenseTable<T>& d, std::size_t n_layers) {
  Tracking<T> tracking;
  if (d.values.empty()) return tracking;
  tracking.settings = checked(d.tracker);
  tracking.factored = d.factored;
  tracking.record_every = d.run.schedule.record_every;
  tracking.velocity = d.velocity_norms;
  tracking.initial = d.initial;
  const auto require_all = [&](std::size_t size, const char* name) {
    if (size > 0) require_length(static_cast<Index>(size), static_cast<Index>(n_layers), name);
  };
  require_all(tracking.velocity.size(), "velocity_norms");
  require_all(tracking.initial.size(), "initial");
  return tracking;
}

// Descends without the lock, with what `prepare(context)` returns: a stepper and its recorder.
template <class Prepare>
py::tuple descend_with(Call& call, const Run& run, const Progress& progress,
                       const Prepare& prepare) {
  call.require_apart();
  call.monitor = reporting(run.on_record, run.on_progress, run.on_flush);
  Result result{};
  {
    const py::gil_scoped_release release;
    const auto parts = prepare(Context{run.n_threads, &call.monitor});
    result = descend(*parts.first, *parts.second, run.schedule, progress, call.monitor);
  }
  return as_tuple(result);
}

template <class T>
py::tuple dense(const py::list& list, const py::dict& arguments) {
  Call call;
  const auto weights = read_as<std::vector<MatrixRef<T>>>(call, list, "weights");
  const auto d = read_table<DenseTable<T>>(call, arguments);
  const Objective<T> objective = d.objective.objective();
  const Rates rates = rates_of(d.run);
  const OptimizerState<T> state = state_of(d.state, weights);
  const Progress progress = progress_of(d.run, rates);
  const DenseRecords<T> records = dense_records(d, weights);
  const Tracking<T> tracking = tracking_of(d, weights.size());
  return descend_with(call, d.run, progress, [&](const Context& context) {
    auto stepper =
        std::make_unique<DenseDescent<T>>(weights, objective, rates, context, small_limit, state);
    auto recorder =
        std::make_unique<DenseRecorder<T>>(*stepper, records, tracking, objective, rates, context);
    return std::pair(std::move(stepper), std::move(recorder));
  });
}

template <class T>
py::tuple reduced(const py::list& list, const py::dict& arguments) {
  Call call;
  const auto cores = read_as<std::vector<MatrixRef<T>>>(call, list, "cores");
  const auto d = read_table<ReducedTable<T>>(call, arguments);
  const Index n = n_records(d.run.schedule);
  const Rates rates = rates_of(d.run);
  std::vector<Family> families;
  Index n_scalars = 0;
  for (const auto& [first, multiplicity, coupling, rho] : d.families) {
    families.push_back({first, multiplicity, coupling, rho});
    n_scalars += static_cast<Index>(rho.size());
  }
  ReducedRecords<T> records;
  for (std::size_t l = 0; l < cores.size(); ++l) {
    const Index rows = cores[l].rows, cols = cores[l].cols;
    records.core_sizes.push_back(rows * cols);
    records.cores.push_back(d.core_records.at(l).room(n, {rows, cols}, at("core_records", l)));
  }
  records.rho = d.rho_records.room(n, {n_scalars}, "rho_records");
  const OptimizerState<T> state = state_of(d.state, cores);
  const Progress progress = progress_of(d.run, rates);
  return descend_with(call, d.run, progress, [&](const Context& context) {
    auto stepper = std::make_unique<ReducedDescent<T>>(cores, d.objective, families, rates, context,
                                                       state, d.scalars);
    auto recorder = std::make_unique<ReducedRecorder<T>>(*stepper, records);
    return std::pair(std::move(stepper), std::move(recorder));
  });
}

template <class T>
py::list batch(const py::list& list, const py::dict& arguments) {
  Call call;
  auto d = read_table<BatchTable<T>>(call, arguments);
  read(call, list, "cores", d.batch.cores);
  require_length(static_cast<Index>(d.core_records.size()),
                 static_cast<Index>(d.batch.cores.size()), "core_records");
  BatchRecords<T> records{d.loss, {}, d.rho_records, d.counts};
  for (const auto& [data, shape] : d.core_records) {
    records.cores.push_back({data, shape[0] * shape[1], shape[2], shape[3]});
  }
  for (const auto& [first, length] : d.families) d.batch.families.push_back({first, length});
  call.require_apart();
  std::vector<Result> results;
  {
    const py::gil_scoped_release release;
    results = batch_descent<T>(d.batch, {d.steps, d.record_every, d.tolerance}, records,
                               Context{d.n_threads, &call.monitor});
  }
  py::list found;
  for (const Result& result : results) found.append(as_tuple(result));
  return found;
}

template <class T>
double gradients(const py::list& list, const py::dict& objective, const py::list& outputs,
                 int n_threads) {
  Call call;
  const auto weights = read_as<std::vector<MatrixRef<const T>>>(call, list, "weights");
  const auto found = read_as<std::vector<MatrixRef<T>>>(call, outputs, "gradients");
  const auto d = read_table<ObjectiveTable<T>>(call, objective);
  call.require_apart();
  const py::gil_scoped_release release;
  return compute_gradients<T>(weights, d.objective(), found, {n_threads, &call.monitor});
}

}  // namespace

void bind_descent(py::module_& m) {
  using py::arg;
  const auto of_list = [](auto in_double, auto in_float) {
    return [=](const py::list& list, const py::dict& arguments) {
      return holds_float(list) ? in_float(list, arguments) : in_double(list, arguments);
    };
  };
  m.def("dense_descent", of_list(&dense<double>, &dense<float>), arg("weights"), arg("arguments"),
        "Gradient descent on whole matrices, in place; returns (outcome, step, layer).");
  m.def("reduced_descent", of_list(&reduced<double>, &reduced<float>), arg("cores"),
        arg("arguments"), "Gradient descent on cores and scalars; returns (outcome, step, layer).");
  m.def("batch_descent", of_list(&batch<double>, &batch<float>), arg("cores"), arg("arguments"),
        "Descent of many reduced runs of equal shape; returns (outcome, step, layer) of each.");
  m.def(
      "gradients",
      [](const py::list& weights, const py::dict& objective, const py::list& out, int n_threads) {
        const auto run = holds_float(weights) ? &gradients<float> : &gradients<double>;
        return run(weights, objective, out, n_threads);
      },
      arg("weights"), arg("objective"), arg("gradients"), arg("n_threads") = 0,
      "Writes the gradient of the loss with respect to each layer; returns the loss.");
  m.def(
      "best_pivot", [](const std::vector<Index>& widths) { return best_pivot(widths); },
      arg("widths"), "Where the dense engine splits the chain of products.");
  m.def(
      "step_flops",
      [](const std::vector<Index>& widths, Index pivot) { return step_flops(widths, pivot); },
      arg("widths"), arg("pivot"), "Flops of one dense step with that pivot.");
}

}  // namespace dlnfast::python
