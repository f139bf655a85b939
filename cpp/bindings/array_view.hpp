// SPDX-License-Identifier: MIT
// NumPy arrays as views for the core: checked, never copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "dlnfast/types.hpp"

namespace dlnfast::python {

namespace py = pybind11;

// What a run reads and writes, held from here on: a callback, a signal handler or another thread may
// empty the caller's dictionary and lists meanwhile. Lists in it are held as tuples.
inline py::dict held(const py::dict& arguments) {
  py::dict d;
  for (const auto& [key, value] : arguments) {
    d[key] = py::isinstance<py::list>(value)
                 ? py::object(py::tuple(py::reinterpret_borrow<py::list>(value)))
                 : py::reinterpret_borrow<py::object>(value);
  }
  return d;
}

inline bool is_single(const py::array& array) { return py::isinstance<py::array_t<float>>(array); }

// A C-contiguous, aligned array of T with n axes, or a TypeError that names the argument.
template <class T>
py::array checked_array(py::handle object, py::ssize_t n_axes, const std::string& name) {
  if (!py::isinstance<py::array>(object)) throw py::type_error(name + " is not a NumPy array");
  auto array = py::reinterpret_borrow<py::array>(object);
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(name + " has dtype " + py::str(array.dtype()).cast<std::string>() +
                         "; wanted " + py::str(py::dtype::of<T>()).cast<std::string>());
  }
  if (array.ndim() != n_axes) {
    throw py::value_error(name + " has " + std::to_string(array.ndim()) + " axes; wanted " +
                          std::to_string(n_axes));
  }
  if ((array.flags() & py::array::c_style) == 0) {
    throw py::type_error(name + " is not C-contiguous");
  }
  if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
    throw py::type_error(name + " is not aligned");
  }
  return array;
}

template <class T>
py::array writable_array(py::handle object, py::ssize_t n_axes, const std::string& name) {
  py::array array = checked_array<T>(object, n_axes, name);
  if (!array.writeable()) throw py::value_error(name + " is read-only");
  return array;
}

template <class T>
MatrixRef<const T> matrix(py::handle object, const std::string& name) {
  const py::array array = checked_array<T>(object, 2, name);
  return {static_cast<const T*>(array.data()), array.shape(0), array.shape(1)};
}

template <class T>
MatrixRef<T> writable_matrix(py::handle object, const std::string& name) {
  py::array array = writable_array<T>(object, 2, name);
  return {static_cast<T*>(array.mutable_data()), array.shape(0), array.shape(1)};
}

// y = x^T
template <class T>
void copy_transposed(MatrixRef<const T> x, MatrixRef<T> y) {
  for (Index i = 0; i < y.rows; ++i) {
    for (Index j = 0; j < y.cols; ++j) y.row(i)[j] = x.row(j)[i];
  }
}

// A matrix, or nothing for None.
template <class T>
MatrixRef<const T> optional_matrix(py::handle object, const std::string& name) {
  if (object.is_none()) return {};
  return matrix<T>(object, name);
}

template <class T>
std::vector<MatrixRef<T>> writable_matrices(const py::sequence& list, const std::string& name) {
  std::vector<MatrixRef<T>> result;
  for (py::size_t i = 0; i < list.size(); ++i) {
    result.push_back(writable_matrix<T>(list[i], name + "[" + std::to_string(i) + "]"));
  }
  return result;
}

// One output array per layer with a leading axis for the records; `rest` are the other sizes.
template <class T>
T* records(py::handle object, Index n, const std::vector<Index>& rest, const std::string& name) {
  const py::ssize_t n_axes = static_cast<py::ssize_t>(rest.size()) + 1;
  py::array array = writable_array<T>(object, n_axes, name);
  bool fits = array.shape(0) >= n;
  for (std::size_t i = 0; i < rest.size(); ++i) {
    fits = fits && array.shape(static_cast<py::ssize_t>(i) + 1) == rest[i];
  }
  if (!fits) throw py::value_error(name + " has the wrong shape for the records of this run");
  return static_cast<T*>(array.mutable_data());
}

}  // namespace dlnfast::python
