// SPDX-License-Identifier: MIT
#include <exception>

#include "bindings.hpp"

namespace {

// What a dictionary holds is an argument like any other: of the wrong type, it is a TypeError.
void translate(std::exception_ptr failure) {
  try {
    if (failure) std::rethrow_exception(failure);
  } catch (const pybind11::cast_error& error) {
    pybind11::set_error(PyExc_TypeError, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(bindings, m) {
  m.doc() = "The compiled core of dlnfast. Use the functions of the package dlnfast instead.";
  pybind11::register_local_exception_translator(&translate);
  dlnfast::python::bind_basis(m);
  dlnfast::python::bind_batch_descent(m);
  dlnfast::python::bind_build_info(m);
  dlnfast::python::bind_completion(m);
  dlnfast::python::bind_product(m);
  dlnfast::python::bind_singular_values(m);
  dlnfast::python::bind_svd_tracker(m);
  dlnfast::python::bind_descent(m);
}
