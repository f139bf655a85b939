// SPDX-License-Identifier: MIT
// Functions of the module from the kinds of their arguments: arrays become views, the precision of the
// first array chooses float or double, and the body runs without the lock.
#pragma once

#include <tuple>
#include <utility>

#include "call.hpp"

namespace dlnfast::python {

// Stands for float or double in a kind, whichever the call is in.
struct Number {};
template <class E>
constexpr bool is_number = std::is_same_v<std::remove_const_t<E>, Number>;

// Kinds of arguments: arrays with n axes (`const`: only read; optional: may be None), entries and
// measurements, the number of threads (Context), and whatever pybind11 converts.
template <class E, int n, bool optional = false>
struct Array {};
using In = Array<const Number, 2>;
using Out = Array<Number, 2>;
using MaybeOut = Array<Number, 2, true>;

template <class Kind>
struct Argument {
  using Type = Kind;
  template <class T>
  static Kind view(Call&, const Kind& given, const char*) {
    return given;
  }
};

template <class E, int n, bool optional>
struct Argument<Array<E, n, optional>> {
  using Type = std::conditional_t<optional, const py::object&, const py::array&>;
  template <class T>
  static auto view(Call& call, Type given, const char* name) {
    using Number = std::conditional_t<std::is_const_v<E>, const T, T>;
    using Item = std::conditional_t<is_number<E>, Number, E>;
    std::conditional_t<is_number<E> && n == 2, MatrixRef<Item>, View<Item, n>> out;
    if (!optional || !given.is_none()) read(call, given, name, out);
    return out;
  }
};

template <template <class> class Parts>
struct Argument<Parts<Number>> {  // SparseRows, ObservedEntries, Measurements
  using Type = const py::tuple&;
  template <class T>
  static Parts<T> view(Call& call, Type given, const char* name) {
    Parts<T> out;
    read(call, given, name, out);
    return out;
  }
};

template <>
struct Argument<Context> {
  using Type = int;
  template <class T>
  static Context view(Call& call, int n_threads, const char*) {
    return {n_threads, &call.monitor};
  }
};

template <class Kind>
constexpr bool has_precision = false;
template <class E, int n>
constexpr bool has_precision<Array<E, n>> = is_number<E>;

template <class Kind, class Given>
void find_first(const Given& given, py::handle& first) {
  if constexpr (has_precision<Kind>) {
    if (!first) first = given;
  }
}

// The result of f; of a list of numbers, as an array.
template <class F>
auto to_python(const F& f) {
  if constexpr (std::is_same_v<decltype(f()), std::vector<double>>) {
    return to_array(f());
  } else {
    return f();
  }
}

// m.name(names...) converts, and calls `body` with a view, a Context or a value of each kind.
template <class... Kinds, class Body, class... Names>
void define(py::module_& m, const char* name, const char* doc, const Body& body,
            const Names&... names) {
  static_assert(sizeof...(Kinds) == sizeof...(Names));
  const auto run = [=](typename Argument<Kinds>::Type... given) {
    const auto in_precision = [&](auto zero) {
      using T = decltype(zero);
      Call call;
      std::tuple views{Argument<Kinds>::template view<T>(call, given, names.name)...};
      call.require_apart();
      return to_python([&] {
        const py::gil_scoped_release release;
        return std::apply(body, views);
      });
    };
    if constexpr ((has_precision<Kinds> || ...)) {
      py::handle first;
      (find_first<Kinds>(given, first), ...);
      return is_float(first) ? in_precision(float()) : in_precision(double());
    } else {
      return in_precision(double());
    }
  };
  m.def(name, run, names..., doc);
}

}  // namespace dlnfast::python
