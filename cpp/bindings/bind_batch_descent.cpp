// SPDX-License-Identifier: MIT
#include <pybind11/stl.h>

#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/batch_descent.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"
#include "outcome.hpp"

namespace dlnfast::python {
namespace {

template <class T>
Stack<const T> stack(py::handle object, const std::string& name) {
  const py::array array = checked_array<T>(object, 3, name);
  return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1), array.shape(2)};
}

template <class T>
Stack<const T> optional_stack(py::handle object, const std::string& name) {
  if (object.is_none()) return {};
  return stack<T>(object, name);
}

// Records of all runs, (n_runs, n_records, rows, cols), as one stack.
template <class T>
Stack<T> record_stack(py::handle object, const std::string& name) {
  py::array array = writable_array<T>(object, 4, name);
  return {static_cast<T*>(array.mutable_data()), array.shape(0) * array.shape(1), array.shape(2),
          array.shape(3)};
}

template <class T>
py::list run_batch(const py::tuple& cores, const py::dict& d) {
  Batch<T> batch;
  BatchRecords<T> records;
  const py::tuple core_records = d["core_records"];
  if (core_records.size() != cores.size())
    throw py::value_error("core_records has the wrong length");
  for (py::size_t l = 0; l < cores.size(); ++l) {
    const std::string at = "[" + std::to_string(l) + "]";
    batch.cores.push_back(stack<T>(cores[l], "cores" + at));
    records.cores.push_back(record_stack<T>(core_records[l], "core_records" + at));
  }
  batch.target = stack<T>(d["target"], "target");
  batch.input_gram = optional_stack<T>(d["input_gram"], "input_gram");
  batch.input_factor = optional_stack<T>(d["input_factor"], "input_factor");
  batch.factor_target = optional_stack<T>(d["factor_target"], "factor_target");
  for (const py::handle item : py::list(d["families"])) {
    const auto [first, length] = item.cast<std::pair<Index, Index>>();
    batch.families.push_back({first, length});
  }
  batch.rho = matrix<double>(d["rho"], "rho");
  batch.multiplicity = matrix<double>(d["multiplicity"], "multiplicity");
  batch.coupling = matrix<double>(d["coupling"], "coupling");
  batch.learning_rate = matrix<double>(d["learning_rate"], "learning_rate");
  batch.weight_decay = matrix<double>(d["weight_decay"], "weight_decay");
  batch.momentum = matrix<double>(d["momentum"], "momentum");
  batch.loss_scale = matrix<double>(d["loss_scale"], "loss_scale");
  batch.loss_floor = matrix<double>(d["loss_floor"], "loss_floor");

  const Schedule schedule{d["steps"].cast<Index>(), d["record_every"].cast<Index>(),
                          d["tolerance"].cast<double>()};
  records.loss = writable_matrix<double>(d["loss"], "loss");
  py::array rho = writable_array<double>(d["rho_records"], 3, "rho_records");
  records.rho = {static_cast<double*>(rho.mutable_data()), rho.shape(0), rho.shape(1),
                 rho.shape(2)};
  records.counts = writable_matrix<std::int64_t>(d["counts"], "counts");
  const int n_threads = d["n_threads"].cast<int>();
  Footprints footprints;
  footprints.reads(cores, "cores");
  for (const char* name :
       {"target", "input_gram", "input_factor", "factor_target", "rho", "multiplicity", "coupling",
        "learning_rate", "weight_decay", "momentum", "loss_scale", "loss_floor"}) {
    footprints.reads(d[name], name);
  }
  for (const char* name : {"loss", "core_records", "rho_records", "counts"}) {
    footprints.writes(d[name], name);
  }
  footprints.require_apart();

  Monitor monitor = listening();
  std::vector<Result> results;
  {
    const py::gil_scoped_release release;
    results = batch_descent<T>(batch, schedule, records, Context{n_threads, &monitor});
  }
  py::list list;
  for (const Result& result : results) list.append(as_tuple(result));
  return list;
}

}  // namespace

void bind_batch_descent(py::module_& m) {
  m.def(
      "batch_descent",
      [](const py::list& list, const py::dict& arguments) {
        const py::tuple cores(list);
        const bool single = cores.size() > 0 && py::isinstance<py::array_t<float>>(cores[0]);
        return single ? run_batch<float>(cores, held(arguments))
                      : run_batch<double>(cores, held(arguments));
      },
      py::arg("cores"), py::arg("arguments"),
      "Descent of many reduced runs of equal shape; returns (outcome, step, layer) of each.");
}

}  // namespace dlnfast::python
