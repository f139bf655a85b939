#include "bindings.hpp"

PYBIND11_MODULE(DLNFAST_MODULE, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The compiled core of dlnfast. Use the functions of the package dlnfast instead.";
  dlnfast::python::bind_basis(m);
  dlnfast::python::bind_batch_descent(m);
  dlnfast::python::bind_build_info(m);
  dlnfast::python::bind_completion(m);
  dlnfast::python::bind_product(m);
  dlnfast::python::bind_singular_values(m);
  dlnfast::python::bind_svd_tracker(m);
  dlnfast::python::bind_descent(m);
}
