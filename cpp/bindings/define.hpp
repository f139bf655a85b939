// SPDX-License-Identifier: MIT
// Functions and methods in Python from their signatures in C++: arguments are converted and named in
// errors, arrays become views, and the body runs without the GIL.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "convert.hpp"

namespace dlnfast::python {

// The parts of the module.
void bind_kernels(py::module_& m);
void bind_descent(py::module_& m);
void bind_svd_tracker(py::module_& m);

// A Python object that stands for a V, and is annotated as one.
template <class V>
struct Typed {
  py::handle object;
};

using Names = std::vector<std::string>;

// Calls function(values..) with what `objects` hold.
template <class R, class... A, class Function>
Typed<std::decay_t<R>> invoke(Call& call, const Function& function, const Names& names,
                              const std::array<py::handle, sizeof...(A)>& objects) {
  std::tuple<A...> values;
  auto name = names.begin();
  auto object = objects.begin();
  std::apply([&](A&... value) { (read(call, *object++, *name++, value), ...); }, values);
  call.require_apart();
  const auto run = [&]() -> R {
    const py::gil_scoped_release release;
    return std::apply(function, values);
  };
  if constexpr (std::is_void_v<R>) {
    run();
    return {py::none().release()};
  } else {
    return {to_python(run()).release()};
  }
}

// Whether the first array of floating point numbers, by itself or as the first of a list, is of float.
template <std::size_t n>
bool is_single(const std::array<py::handle, n>& objects) {
  for (py::handle item : objects) {
    const bool is_list = PyList_Check(item.ptr()) || PyTuple_Check(item.ptr());
    if (is_list && py::len(item) > 0) item = PySequence_Fast_GET_ITEM(item.ptr(), 0);
    if (!py::isinstance<py::array>(item)) continue;
    const int type = py::reinterpret_borrow<py::array>(item).dtype().num();
    if (type == py::dtype::num_of<float>()) return true;
    if (type == py::dtype::num_of<double>()) return false;
  }
  return false;
}

// The number of threads is 0 by default.
template <class V>
auto argument(const std::string& name) {
  if constexpr (std::is_same_v<V, Context>) {
    return py::arg(name.c_str()) = 0;
  } else {
    return py::arg(name.c_str());
  }
}

// scope.name(names..), which are separated by commas.
template <class... A, class Scope, class Run, class... Extra>
void define_run(Scope& scope, const char* name, const Names& names, const Run& run,
                const Extra&... extra) {
  if (names.size() != sizeof...(A)) throw std::logic_error(name);
  auto next = names.begin();
  const std::tuple arguments{argument<A>(*next++)...};
  std::apply([&](const auto&... each) { scope.def(name, run, each..., extra...); }, arguments);
}

// A function in two precisions: that of its arrays.
template <class R, class... F, class... D>
void define(py::module_& m, const char* name, const char* argument_names, const char* doc,
            R (*in_float)(F...), R (*in_double)(D...)) {
  const Names names = split_names(argument_names);
  const auto run = [=](Typed<std::decay_t<F>>... arguments) {
    const std::array<py::handle, sizeof...(F)> objects{arguments.object...};
    Call call;
    if (is_single(objects)) return invoke<R, std::decay_t<F>...>(call, in_float, names, objects);
    return invoke<R, std::decay_t<D>...>(call, in_double, names, objects);
  };
  define_run<std::decay_t<F>...>(m, name, names, run, doc);
}

template <class R, class... A>
void define(py::module_& m, const char* name, const char* argument_names, const char* doc,
            R (*function)(A...)) {
  define(m, name, argument_names, doc, function, function);
}

// A method, called with the Call and its arguments; its object is held until the result is converted.
template <class Class, class R, class... A>
void define(py::class_<Class>& c, const char* name, const char* argument_names,
            R (Class::*method)(Call&, A...)) {
  const Names names = split_names(argument_names);
  const auto run = [=](Class& self, Typed<std::decay_t<A>>... arguments) {
    Call call;
    const auto lock = self.hold();
    const auto bound = [&](const std::decay_t<A>&... values) -> R {
      return (self.*method)(call, values...);
    };
    return invoke<R, std::decay_t<A>...>(call, bound, names, {arguments.object...});
  };
  define_run<std::decay_t<A>...>(c, name, names, run);
}

}  // namespace dlnfast::python

template <class V>
struct pybind11::detail::type_caster<dlnfast::python::Typed<V>> {
  PYBIND11_TYPE_CASTER(dlnfast::python::Typed<V>, dlnfast::python::annotation<V>);
  bool load(handle source, bool) {
    value.object = source;
    return true;
  }
  static handle cast(const dlnfast::python::Typed<V>& owned, return_value_policy, handle) {
    return owned.object;
  }
};
