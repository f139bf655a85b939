// SPDX-License-Identifier: MIT
// The parts of the extension module. Each converts, releases the GIL and calls the core.
#pragma once

#include <pybind11/pybind11.h>

namespace dlnfast::python {

void bind_products(pybind11::module_& m);
void bind_completion(pybind11::module_& m);
void bind_descent(pybind11::module_& m);
void bind_svd_tracker(pybind11::module_& m);

}  // namespace dlnfast::python
