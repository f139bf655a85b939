// SPDX-License-Identifier: MIT
// NumPy arrays as views for the core: checked, never copied, and apart from each other where one is written.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "dlnfast/batch_descent.hpp"
#include "dlnfast/completion.hpp"
#include "dlnfast/errors.hpp"
#include "interrupt.hpp"

namespace dlnfast::python {

inline bool is_float(py::handle array) { return py::isinstance<py::array_t<float>>(array); }
inline bool holds_float(const py::list& list) { return !list.empty() && is_float(list[0]); }

// An array with n axes. Of a const T it is only read.
template <class T, int n>
struct View {
  T* data = nullptr;
  std::array<Index, n> shape{};

  // The data, if the first axis has at least `size` entries and the others have these sizes.
  T* room(Index size, const std::array<Index, n - 1>& rest, const std::string& name) const {
    if (shape[0] >= size && std::equal(rest.begin(), rest.end(), shape.begin() + 1)) return data;
    throw ShapeError(name + " has the wrong shape for the records of this run");
  }
};

// One call from Python: its monitor, and its arrays. It keeps a reference to each of them, as callbacks may
// empty the caller's containers.
class Call {
 public:
  Monitor monitor = listening();

  // A C-contiguous, aligned array of T, or an error that names the argument.
  template <class T, int n>
  View<T, n> view(py::handle object, const std::string& name) {
    if (!py::isinstance<py::array>(object)) throw py::type_error(name + " is not a NumPy array");
    auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<std::remove_const_t<T>>>(array)) {
      const auto wanted = py::dtype::of<std::remove_const_t<T>>();
      throw py::type_error(name + " has dtype " + std::string(py::str(array.dtype())) +
                           "; wanted " + std::string(py::str(wanted)));
    }
    if (array.ndim() != n) {
      throw py::value_error(name + " has " + std::to_string(array.ndim()) + " axes; wanted " +
                            std::to_string(n));
    }
    if ((array.flags() & py::array::c_style) == 0) {
      throw py::type_error(name + " is not C-contiguous");
    }
    if ((array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_) == 0) {
      throw py::type_error(name + " is not aligned");
    }
    if (!std::is_const_v<T> && !array.writeable()) throw py::value_error(name + " is read-only");
    View<T, n> view{static_cast<T*>(const_cast<void*>(array.data())), {}};
    std::copy(array.shape(), array.shape() + n, view.shape.begin());
    const auto* begin = static_cast<const char*>(array.data());
    spans_.push_back({begin, begin + array.nbytes(), !std::is_const_v<T>, name, std::move(array)});
    return view;
  }

  // Indices, counts and pieces of work are checked once and then trusted: what a call writes may share
  // memory with nothing else that it uses.
  void require_apart() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    const Span *last = nullptr, *last_written = nullptr;  // those that reach furthest so far
    for (const Span& span : spans_) {
      if (span.begin == span.end) continue;
      const Span* before = span.written ? last : last_written;
      if (before != nullptr && before->end > span.begin) {
        throw py::value_error(before->name + " and " + span.name +
                              " share memory; wanted arrays apart from those written");
      }
      if (last == nullptr || span.end > last->end) last = &span;
      if (span.written && (last_written == nullptr || span.end > last_written->end)) {
        last_written = &span;
      }
    }
  }

 private:
  struct Span {
    const char *begin, *end;
    bool written;
    std::string name;
    py::array held;
  };

  std::vector<Span> spans_;
};

// Reads an argument, or an entry of a dictionary, as what pybind11 converts, or by the name of a value.
template <class V>
void read(Call&, py::handle object, const std::string& name, V& out) {
  if constexpr (std::is_enum_v<V>) {
    const auto given = object.cast<std::string>();
    const auto& names = names_of(V());
    const auto* found = std::find(std::begin(names), std::end(names), given);
    if (found == std::end(names)) {
      std::string wanted;
      for (const char* one : names) wanted += (wanted.empty() ? "" : ", ") + std::string(one);
      throw py::value_error(name + " is '" + given + "'; wanted one of " + wanted);
    }
    out = static_cast<V>(found - names);
  } else {
    out = object.cast<V>();
  }
}

template <class T, int n>
void read(Call& call, py::handle object, const std::string& name, View<T, n>& out) {
  out = call.view<T, n>(object, name);
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, MatrixRef<T>& out) {
  if (object.is_none()) return;
  const auto view = call.view<T, 2>(object, name);
  out = {view.data, view.shape[0], view.shape[1]};
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, Stack<T>& out) {
  if (object.is_none()) return;
  const auto view = call.view<T, 3>(object, name);
  out = {view.data, view.shape[0], view.shape[1], view.shape[2]};
}

template <class V>
void read(Call& call, py::handle object, const std::string& name, std::optional<V>& out) {
  if (!object.is_none()) read(call, object, name, out.emplace());
}

template <class V, class = void>
constexpr bool is_view = false;
template <class V>
constexpr bool is_view<V, std::void_t<decltype(V::data)>> = true;

// Arrays are read from a list or tuple, by their positions; numbers as pybind11 does.
template <class V>
void read(Call& call, py::handle object, const std::string& name, std::vector<V>& out) {
  if constexpr (!is_view<V>) {
    out = object.cast<std::vector<V>>();
    return;
  }
  if (!py::isinstance<py::list>(object) && !py::isinstance<py::tuple>(object)) {
    throw py::type_error(name + " is not a list or tuple");
  }
  for (const py::handle item : object) {
    const std::string position = name + "[" + std::to_string(out.size()) + "]";
    if (item.is_none()) throw py::type_error(position + " is not a NumPy array");
    read(call, item, position, out.emplace_back());
  }
}

inline py::tuple tuple_of(py::handle object, std::size_t size, const std::string& name,
                          const std::string& wanted) {
  if (!py::isinstance<py::tuple>(object)) throw py::type_error(name + " is not " + wanted);
  auto tuple = py::reinterpret_borrow<py::tuple>(object);
  if (tuple.size() != size) throw py::value_error(name + " is not " + wanted);
  return tuple;
}

// As many rows as there are starts, less one; how many columns, the tuple does not say.
template <class T>
void read(Call& call, py::handle object, const std::string& name, SparseRows<T>& out) {
  const py::tuple parts = tuple_of(object, 3, name, "(start, index, values)");
  const auto start = call.view<const std::int64_t, 1>(parts[0], name + "[0]");
  const auto index = call.view<const std::int32_t, 1>(parts[1], name + "[1]");
  const auto values = call.view<const T, 1>(parts[2], name + "[2]");
  if (start.shape[0] < 1) throw py::value_error(name + "[0] is empty");
  require_length(values.shape[0], index.shape[0], name + "[2]");
  out = {start.shape[0] - 1, 0, index.shape[0], start.data, index.data, values.data};
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, ObservedEntries<T>& out) {
  const py::tuple orders = tuple_of(object, 2, name, "(by_rows, by_columns)");
  read(call, orders[0], name + "[0]", out.by_rows);
  read(call, orders[1], name + "[1]", out.by_columns);
  out.by_rows.cols = out.by_columns.rows;
  out.by_columns.cols = out.by_rows.rows;
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, Measurements<T>& out) {
  const py::tuple parts = tuple_of(object, 2, name, "(operators, values)");
  read(call, parts[0], name + "[0]", out.operators);
  const auto values = call.view<const T, 1>(parts[1], name + "[1]");
  require_length(values.shape[0], out.operators.rows, name + "[1]");
  out.values = values.data;
}

template <class V>
V read_as(Call& call, py::handle object, const std::string& name) {
  V out;
  read(call, object, name, out);
  return out;
}

// A copy for Python.
template <class E>
py::array_t<E> to_array(const std::vector<E>& values) {
  return py::array_t<E>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace dlnfast::python
