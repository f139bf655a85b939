// SPDX-License-Identifier: MIT
// How a run ended, as Python hears it.
#pragma once

#include <pybind11/pybind11.h>

#include "dlnfast/descent.hpp"

namespace dlnfast::python {

inline const char* name_of(Outcome outcome) {
  switch (outcome) {
    case Outcome::finished: return "finished";
    case Outcome::converged: return "converged";
    case Outcome::stopped: return "stopped";
    case Outcome::diverged: return "diverged";
  }
  return "unknown";
}

inline pybind11::tuple as_tuple(const Result& result) {
  return pybind11::make_tuple(name_of(result.outcome), result.step, result.layer);
}

}  // namespace dlnfast::python
