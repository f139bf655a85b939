// SPDX-License-Identifier: MIT
// The parts of the extension module. Each converts, releases the GIL and hands on to the core.
#pragma once

#include <pybind11/pybind11.h>

namespace dlnfast::python {

void bind_basis(pybind11::module_& m);
void bind_batch_descent(pybind11::module_& m);
void bind_build_info(pybind11::module_& m);
void bind_completion(pybind11::module_& m);
void bind_product(pybind11::module_& m);
void bind_singular_values(pybind11::module_& m);
void bind_svd_tracker(pybind11::module_& m);
void bind_descent(pybind11::module_& m);

}  // namespace dlnfast::python
