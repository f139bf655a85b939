// SPDX-License-Identifier: MIT
#include <pybind11/stl.h>

#include <algorithm>

#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/recorders.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"
#include "observations.hpp"
#include "outcome.hpp"
#include "tracker_settings.hpp"

namespace dlnfast::python {
namespace {

template <class T>
Objective<T> objective_of(const py::dict& d) {
  Objective<T> o;
  o.target = optional_matrix<T>(d["target"], "target");
  o.input_gram = optional_matrix<T>(d["input_gram"], "input_gram");
  o.input_factor = optional_matrix<T>(d["input_factor"], "input_factor");
  o.factor_target = optional_matrix<T>(d["factor_target"], "factor_target");
  o.loss_scale = d["loss_scale"].cast<double>();
  o.loss_floor = d["loss_floor"].cast<double>();
  return o;
}

// Observations of the matrix itself, where there are any.
template <class T>
struct Observed {
  ObservedEntries<T> entries;
  Measurements<T> measured;

  Observed(const py::dict& d, Objective<T>& objective) {
    const py::object observed = d["observed"], given = d["measurements"];
    if (!observed.is_none()) {
      entries = observed_entries<T>(observed, "observed");
      objective.observed = &entries;
    }
    if (!given.is_none()) {
      measured = measurements<T>(given, "measurements");
      objective.measured = &measured;
    }
  }
  Observed(const Observed&) = delete;  // the objective refers to it
  Observed& operator=(const Observed&) = delete;
};

// The arguments that both engines share, as Python hands them over.
struct Arguments {
  Rates rates;
  Schedule schedule;
  int n_threads;
  py::array loss, record_steps, counts, rate;
  py::object on_record, on_progress, on_drain;
  py::tuple velocity, carry, search;

  explicit Arguments(const py::dict& d)
      : rates{d["learning_rate"].cast<std::vector<double>>(),
              d["weight_decay"].cast<std::vector<double>>(),
              d["momentum"].cast<std::vector<double>>(), AdaptiveRate{}},
        schedule{d["steps"].cast<Index>(), d["record_every"].cast<Index>(),
                 d["tolerance"].cast<double>(), d["first"].cast<Index>(),
                 d["drain_every"].cast<Index>()},
        n_threads(d["n_threads"].cast<int>()),
        loss(d["loss"].cast<py::array>()),
        record_steps(d["record_steps"].cast<py::array>()),
        counts(d["counts"].cast<py::array>()),
        on_record(d["on_record"]),
        on_progress(d["on_progress"]),
        on_drain(d["on_drain"]),
        velocity(d["velocity"]),
        carry(d["carry"]),
        search(d["search"]) {
    n_records(schedule);  // checks the schedule before any size follows from it
    if (d.contains("adaptive")) {
      const py::object adaptive = d["adaptive"];
      if (!adaptive.is_none()) {
        const auto [safety, curvature, error_scale] =
            adaptive.cast<std::tuple<double, std::vector<double>, double>>();
        rates.adaptive = {safety, curvature, error_scale};
        rate = d["rate"].cast<py::array>();
      }
    }
  }

  Progress progress() const {
    Progress p;
    p.loss = records<double>(loss, dlnfast::n_losses(schedule), {}, "loss");
    p.record_steps = records<std::int64_t>(record_steps, n_records(schedule), {}, "record_steps");
    if (rates.adaptive.safety > 0.0) {
      // A step follows every loss but the last.
      const Index n = dlnfast::n_losses(schedule);
      p.rate = records<double>(rate, schedule.drain_every > 0 ? n : n - 1, {}, "rate");
    }
    auto* c = records<std::int64_t>(counts, n_counts, {}, "counts");
    std::fill(c, c + n_counts, 0);
    p.n_losses = c;
    p.n_records = c + 1;
    p.n_rates = c + 3;
    p.between_steps = c + 4;
    return p;
  }

  std::int64_t* n_snapshots() const {
    return records<std::int64_t>(counts, n_counts, {}, "counts") + 2;
  }

  template <class T>
  Motion<T> motion(const std::vector<MatrixRef<T>>& weights) const {
    Motion<T> m{
        writable_matrices<T>(velocity, "velocity"), writable_matrices<T>(carry, "carry"), {}};
    for (py::size_t l = 0; l < search.size(); ++l) {
      const auto at = "search[" + std::to_string(l) + "]";
      py::array array = writable_array<T>(search[l], 1, at);
      if (l >= weights.size() || array.shape(0) != weights[l].cols) {
        throw py::value_error(at + " has the wrong length");
      }
      m.search.push_back(static_cast<T*>(array.mutable_data()));
    }
    return m;
  }

  bool drains() const { return schedule.drain_every > 0; }

  static constexpr Index n_counts = 5;
};

// Beside the layers, whose motion and records they hold; what is not there has no footprint.
void require_apart(const py::tuple& layers, const char* layers_name, const py::dict& d) {
  Footprints footprints;
  footprints.writes(layers, layers_name);
  for (const auto& [key, value] : d) {
    const auto name = key.cast<std::string>();
    const auto is = [&](const char* other) { return name == other; };
    if (is("target") || is("input_gram") || is("input_factor") || is("factor_target") ||
        is("observed") || is("measurements") || is("initial")) {
      footprints.reads(value, name);
    } else {
      footprints.writes(value, name);
    }
  }
  footprints.require_apart();
}

// Where records are drained, the caller's arrays hold the state whatever ends the run.
Result descend_and_store(Stepper& stepper, Recorder& recorder, const Arguments& a,
                         const Progress& progress, Monitor& monitor) {
  if (!a.drains()) return descend(stepper, recorder, a.schedule, progress, monitor);
  try {
    const Result result = descend(stepper, recorder, a.schedule, progress, monitor);
    stepper.store();
    return result;
  } catch (...) {
    stepper.store();
    throw;
  }
}

template <class T>
py::tuple dense(const py::tuple& weights, const py::dict& d) {
  const Arguments a(d);
  const auto w = writable_matrices<T>(weights, "weights");
  const Index n = n_records(a.schedule);
  DenseRecords<T> out;
  out.snapshot_every = d["snapshot_every"].cast<Index>();
  if (out.snapshot_every < 0) throw py::value_error("snapshot_every is negative");
  out.n_snapshots = a.n_snapshots();
  const Index n_snapshots =
      out.snapshot_every > 0 ? n_multiples(a.schedule, out.snapshot_every) : 0;
  const py::tuple values = d["values"], errors = d["errors"], signs = d["signs"],
                  branches = d["branches"], clusters = d["clusters"], tracking = d["tracking"],
                  left = d["left"], right = d["right"], snapshots = d["snapshots"],
                  initial = d["initial"];
  for (std::size_t l = 0; l < w.size(); ++l) {
    const Index m = w[l].rows, k = w[l].cols;
    const Index kept = std::min({std::max<Index>(d["n_values"].cast<Index>(), 0), m, k});
    const auto at = "[" + std::to_string(l) + "]";
    if (values.size() > 0) {
      out.n_values.push_back(kept);
      out.values.push_back(records<T>(values[l], n, {kept}, "values" + at));
      out.errors.push_back(records<double>(errors[l], n, {kept}, "errors" + at));
      out.signs.push_back(records<double>(signs[l], n, {kept}, "signs" + at));
      out.branches.push_back(records<std::int64_t>(branches[l], n, {kept}, "branches" + at));
      out.clusters.push_back(records<std::int64_t>(clusters[l], n, {kept}, "clusters" + at));
      out.tracking.push_back(
          records<double>(tracking[l], n, {n_tracking_columns}, "tracking" + at));
    }
    if (left.size() > 0) {
      out.left.push_back(records<T>(left[l], n, {m, kept}, "left" + at));
      out.right.push_back(records<T>(right[l], n, {k, kept}, "right" + at));
    }
    if (n_snapshots > 0) {
      out.snapshots.push_back(records<T>(snapshots[l], n_snapshots, {m, k}, "snapshots" + at));
    }
  }
  Tracking<T> following;
  if (values.size() > 0) {
    following.settings = tracker_settings(d["tracker"]);
    following.factored = d["factored"].cast<bool>();
    following.record_every = a.schedule.record_every;
    following.velocity = d["velocity_norms"].cast<std::vector<double>>();
    if (!following.velocity.empty()) {
      require_length(static_cast<Index>(following.velocity.size()), static_cast<Index>(w.size()),
                     "velocity_norms");
    }
    for (std::size_t l = 0; l < initial.size(); ++l) {
      following.initial.push_back(matrix<T>(initial[l], "initial[" + std::to_string(l) + "]"));
    }
    if (initial.size() > 0) {
      require_length(static_cast<Index>(initial.size()), static_cast<Index>(w.size()), "initial");
    }
  }
  auto objective = objective_of<T>(d);
  const Observed<T> observed(d, objective);
  const auto progress = a.progress();
  const auto motion = a.motion<T>(w);
  require_apart(weights, "weights", d);
  Monitor monitor = reporting(a.on_record, a.on_progress, a.on_drain);
  Result result{};
  {
    const py::gil_scoped_release release;
    const Context context{a.n_threads, &monitor};
    DenseDescent<T> stepper(w, objective, a.rates, context, 32, motion);
    DenseRecorder<T> recorder(stepper, out, following, objective, a.rates, context);
    result = descend_and_store(stepper, recorder, a, progress, monitor);
  }
  return as_tuple(result);
}

// A list of (first layer from 0, multiplicity, coupling, initial scalars).
std::vector<Family> families_of(const py::list& list) {
  std::vector<Family> families;
  for (const py::handle item : list) {
    const auto [first, multiplicity, coupling, rho] =
        item.cast<std::tuple<Index, double, double, std::vector<double>>>();
    families.push_back({first, multiplicity, coupling, rho});
  }
  return families;
}

template <class T>
py::tuple reduced(const py::tuple& cores, const py::dict& d) {
  const Arguments a(d);
  const auto c = writable_matrices<T>(cores, "cores");
  const Index n = n_records(a.schedule);
  const std::vector<Family> families = families_of(d["families"]);
  Index n_scalars = 0;
  for (const Family& family : families) n_scalars += static_cast<Index>(family.rho.size());
  ReducedRecords<T> out;
  const py::tuple core_records = d["core_records"];
  for (std::size_t l = 0; l < c.size(); ++l) {
    const auto at = "core_records[" + std::to_string(l) + "]";
    out.core_sizes.push_back(c[l].rows * c[l].cols);
    out.cores.push_back(records<T>(core_records[l], n, {c[l].rows, c[l].cols}, at));
  }
  out.rho = records<double>(d["rho_records"], n, {n_scalars}, "rho_records");
  const auto objective = objective_of<T>(d);
  const auto progress = a.progress();
  const auto motion = a.motion<T>(c);
  MatrixRef<double> scalars;
  if (!d["scalars"].is_none()) scalars = writable_matrix<double>(d["scalars"], "scalars");
  require_apart(cores, "cores", d);
  Monitor monitor = reporting(a.on_record, a.on_progress, a.on_drain);
  Result result{};
  {
    const py::gil_scoped_release release;
    const Context context{a.n_threads, &monitor};
    ReducedDescent<T> stepper(c, objective, families, a.rates, context, motion, scalars);
    ReducedRecorder<T> recorder(stepper, out);
    result = descend_and_store(stepper, recorder, a, progress, monitor);
  }
  return as_tuple(result);
}

template <class T>
double gradients(const py::tuple& weights, const py::dict& d, const py::tuple& out, int n_threads) {
  std::vector<MatrixRef<const T>> w;
  for (py::size_t l = 0; l < weights.size(); ++l) {
    w.push_back(matrix<T>(weights[l], "weights[" + std::to_string(l) + "]"));
  }
  const auto g = writable_matrices<T>(out, "gradients");
  auto objective = objective_of<T>(d);
  const Observed<T> observed(d, objective);
  Footprints footprints;
  footprints.reads(weights, "weights").writes(out, "gradients");
  for (const std::pair<py::handle, py::handle> item : d) {
    footprints.reads(item.second, item.first.cast<std::string>());
  }
  footprints.require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  return compute_gradients<T>(w, objective, g, Context{n_threads, &monitor});
}

bool holds_single(const py::tuple& matrices) {
  return matrices.size() > 0 && py::isinstance<py::array_t<float>>(matrices[0]);
}

}  // namespace

void bind_descent(py::module_& m) {
  m.def(
      "dense_descent",
      [](const py::list& list, const py::dict& arguments) {
        const py::tuple weights(list);
        return holds_single(weights) ? dense<float>(weights, held(arguments))
                                     : dense<double>(weights, held(arguments));
      },
      py::arg("weights"), py::arg("arguments"),
      "Gradient descent on whole matrices, in place; returns (outcome, step, layer).");
  m.def(
      "reduced_descent",
      [](const py::list& list, const py::dict& arguments) {
        const py::tuple cores(list);
        return holds_single(cores) ? reduced<float>(cores, held(arguments))
                                   : reduced<double>(cores, held(arguments));
      },
      py::arg("cores"), py::arg("arguments"),
      "Gradient descent on cores and scalars; returns (outcome, step, layer).");
  m.def(
      "gradients",
      [](const py::list& list, const py::dict& objective, const py::list& out, int n_threads) {
        const py::tuple weights(list);
        const auto run = holds_single(weights) ? &gradients<float> : &gradients<double>;
        return run(weights, held(objective), py::tuple(out), n_threads);
      },
      py::arg("weights"), py::arg("objective"), py::arg("gradients"), py::arg("n_threads") = 0,
      "Writes the gradient of the loss with respect to each layer; returns the loss.");
  py::tuple columns(static_cast<py::size_t>(n_tracking_columns));
  for (Index i = 0; i < n_tracking_columns; ++i) columns[i] = py::str(tracking_column_names[i]);
  m.attr("TRACKING_COLUMNS") = columns;
  m.def(
      "best_pivot", [](const std::vector<Index>& widths) { return best_pivot(widths); },
      py::arg("widths"), "Where the dense engine splits the chain of products.");
  m.def(
      "step_flops",
      [](const std::vector<Index>& widths, Index pivot) { return step_flops(widths, pivot); },
      py::arg("widths"), py::arg("pivot"), "Flops of one dense step with that pivot.");
}

}  // namespace dlnfast::python
