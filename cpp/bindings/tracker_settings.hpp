// SPDX-License-Identifier: MIT
// A tracker's settings, as Python hands them over.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlnfast/svd_tracker.hpp"

namespace dlnfast::python {

inline TrackerSettings tracker_settings(const pybind11::dict& d) {
  TrackerSettings s;
  s.n_values = d["n_values"].cast<Index>();
  s.n_guards = d["n_guards"].cast<Index>();
  const auto mode = d["mode"].cast<std::string>();
  if (mode == "full") {
    s.mode = TrackerMode::full;
  } else if (mode == "dense") {
    s.mode = TrackerMode::dense;
  } else if (mode != "auto") {
    throw pybind11::value_error("mode is '" + mode + "'; wanted auto, dense or full");
  }
  s.tolerance = d["tolerance"].cast<double>();
  s.failure = d["failure"].cast<double>();
  s.max_sweeps = d["max_sweeps"].cast<Index>();
  s.refresh_every = d["refresh_every"].cast<Index>();
  s.seed = d["seed"].cast<std::uint64_t>();
  s.branches.cluster_tolerance = d["cluster_tolerance"].cast<double>();
  s.branches.signed_values = d["signed_values"].cast<bool>();
  if (!(s.failure > 0.0 && s.failure < 1.0)) {
    throw pybind11::value_error("failure is not between 0 and 1");
  }
  return s;
}

}  // namespace dlnfast::python
