// SPDX-License-Identifier: MIT
// The types of the core in Python: `annotation` names them for docstrings and stub, `read` converts an
// argument, `to_python` a result. A table, a struct that lists its fields (dlnfast/reflection.hpp), is a
// dictionary.
#pragma once

#include <pybind11/stl.h>

#include <iterator>
#include <optional>

#include "call.hpp"
#include "dlnfast/batch_descent.hpp"
#include "dlnfast/row_posteriors.hpp"
#include "dlnfast/svd_tracker.hpp"

namespace dlnfast::python {

template <class V, class = void>
constexpr bool is_table = false;
template <class V>
constexpr bool is_table<V, std::void_t<decltype(V::struct_name)>> = true;

// Whether V can be absent. In Python, such a field, or a result that is not wanted, is None.
template <class V, class = void>
constexpr bool may_be_absent = false;
template <class V>
constexpr bool may_be_absent<V, std::void_t<decltype(&V::absent)>> = true;

template <class Table, class Visit>
void visit_fields(Table& table, const Visit& visit) {
  auto name = Table::field_names().begin();
  std::apply([&](auto&... member) { (visit(*name++, member), ...); }, table.fields());
}

// Of an enumeration, the names of all values.
template <class V>
std::string list_names(const char* quote) {
  std::string list;
  for (const char* name : names_of(V()))
    list += (list.empty() ? "" : ", ") + (quote + std::string(name) + quote);
  return list;
}

// Annotations. Arrays of float stand for either precision.
using py::detail::const_name;

template <class E>
constexpr auto array_annotation = const_name<std::is_same_v<E, float>>(
    const_name("_Array"), const_name("npt.NDArray[np.") +
                              const_name<std::is_integral_v<E>>("int", "float") +
                              const_name<8 * sizeof(E)>() + const_name("]"));

template <class V, class = void>
constexpr auto annotation = py::detail::make_caster<V>::name;
template <class V>
constexpr auto
    annotation<V, std::enable_if_t<std::is_arithmetic_v<V> && !std::is_same_v<V, bool>>> =
        const_name<std::is_integral_v<V>>("int", "float");
template <class V>
constexpr auto annotation<V, std::enable_if_t<is_table<V>>> = const_name(V::struct_name);
template <class V>
constexpr auto annotation<V, std::void_t<decltype(V::data)>> =
    array_annotation<std::remove_const_t<std::remove_pointer_t<decltype(V::data)>>>;
template <class V>
constexpr auto annotation<std::vector<V>> =
    const_name("Sequence[") + annotation<V> + const_name("]");
template <class V>
constexpr auto annotation<std::optional<V>> = annotation<V> + const_name(" | None");
template <class T>
constexpr auto annotation<SparseRows<T>> = const_name("_SparseRows");
template <class T>
constexpr auto annotation<ObservedEntries<T>> = const_name("tuple[_SparseRows, _SparseRows]");
template <class T>
constexpr auto annotation<Measurements<T>> = const_name("tuple[_Array, _Array]");
template <class T>
constexpr auto annotation<RowPrior<T>> = const_name("tuple[_Array, _Array]");
template <>
inline constexpr auto annotation<py::object> = const_name("Callable[..., object] | None");
template <>
inline constexpr auto annotation<void> = const_name("None");
template <>
inline constexpr auto annotation<Context> = const_name("int");
template <>
inline constexpr auto annotation<Result> = const_name("tuple[Outcome, int, int]");
template <>
inline constexpr auto annotation<Isometry> = const_name("tuple[float, float, bool]");
template <>
inline constexpr auto annotation<BlockAngle> = const_name("tuple[float, float]");

// The same for results, in which lists of numbers are arrays.
template <class V>
constexpr auto result_annotation = annotation<V>;
template <class E>
constexpr auto result_annotation<std::vector<E>> = array_annotation<E>;

// Adds {name: (tables that it includes, {field: annotation})}.
template <class Table, bool is_result = false>
void describe(py::dict& tables) {
  py::list included;
  py::dict fields;
  Table table;
  visit_fields(table, [&](const std::string& name, const auto& member) {
    using V = std::decay_t<decltype(member)>;
    if constexpr (is_table<V>) {
      if (!tables.contains(V::struct_name)) describe<V, is_result>(tables);
      included.append(V::struct_name);
    } else if constexpr (std::is_enum_v<V>) {
      fields[name.c_str()] = "Literal[" + list_names<V>("\"") + "]";
    } else if constexpr (is_result) {
      fields[name.c_str()] = result_annotation<V>.text;
    } else {
      fields[name.c_str()] = annotation<V>.text + std::string(may_be_absent<V> ? " | None" : "");
    }
  });
  tables[Table::struct_name] = py::make_tuple(included, fields);
}

// Arguments. The name is that in messages.
template <class V>
void read(Call& call, py::handle object, const std::string& name, V& out);

// What pybind11 converts.
template <class V>
V convert(py::handle object, const std::string& name, const char* wanted) {
  py::detail::make_caster<V> caster;
  if (caster.load(object, true)) return py::detail::cast_op<V>(std::move(caster));
  if (std::is_integral_v<V> && PyLong_Check(object.ptr())) {
    throw py::type_error(name + " is " + std::string(py::str(object)) + "; wanted an integer of " +
                         std::to_string(8 * sizeof(V)) + " bits");
  }
  throw py::type_error(name + " is of type " + Py_TYPE(object.ptr())->tp_name + "; wanted " +
                       wanted);
}

template <class T, int n>
void read(Call& call, py::handle object, const std::string& name, ArrayRef<T, n>& out) {
  out = call.view<T, n>(object, name);
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, MatrixRef<T>& out) {
  if (object.is_none() && !std::is_const_v<T>) return;
  const auto view = call.view<T, 2>(object, name);
  out = {view.data, view.shape[0], view.shape[1]};
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, Stack<T>& out) {
  const auto view = call.view<T, 3>(object, name);
  out = {view.data, view.shape[0], view.shape[1], view.shape[2]};
}

inline void read(Call& call, py::handle object, const std::string& name, Context& out) {
  read(call, object, name, out.n_threads);
  out.monitor = &call.monitor;
}

template <class V>
void read(Call& call, py::handle object, const std::string& name, std::optional<V>& out) {
  if (!object.is_none()) read(call, object, name, out.emplace());
}

template <class V>
void read(Call& call, py::handle object, const std::string& name, std::vector<V>& out) {
  if constexpr (std::is_arithmetic_v<V>) {
    out = convert<std::vector<V>>(object, name, annotation<std::vector<V>>.text);
    return;
  }
  if (!py::isinstance<py::list>(object) && !py::isinstance<py::tuple>(object)) {
    throw py::type_error(name + " is not a list or tuple");
  }
  for (const py::handle item : object) {
    const std::string position = name + "[" + std::to_string(out.size()) + "]";
    if (may_be_absent<V> && item.is_none())
      throw py::type_error(position + " is not a NumPy array");
    read(call, item, position, out.emplace_back());
  }
}

// Reads the parts of a tuple, in order.
template <class... V>
void read_parts(Call& call, py::handle object, const std::string& name, const char* wanted,
                V&... out) {
  if (!py::isinstance<py::tuple>(object)) throw py::type_error(name + " is not " + wanted);
  const auto parts = py::reinterpret_borrow<py::tuple>(object);
  if (parts.size() != sizeof...(V)) throw py::value_error(name + " is not " + wanted);
  std::size_t i = 0;
  const auto read_next = [&](auto& part) {
    read(call, parts[i], name + "[" + std::to_string(i) + "]", part);
    ++i;
  };
  (read_next(out), ...);
}

// As many rows as there are starts, less one; how many columns, the tuple does not say.
template <class T>
void read(Call& call, py::handle object, const std::string& name, SparseRows<T>& out) {
  ArrayRef<const std::int64_t, 1> start;
  ArrayRef<const std::int32_t, 1> index;
  ArrayRef<const T, 1> values;
  read_parts(call, object, name, "(start, index, values)", start, index, values);
  if (start.shape[0] < 1) throw py::value_error(name + "[0] is empty");
  require_length(values.shape[0], index.shape[0], name + "[2]");
  out = {start.shape[0] - 1, 0, index.shape[0], start.data, index.data, values.data};
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, ObservedEntries<T>& out) {
  read_parts(call, object, name, "(by_rows, by_columns)", out.by_rows, out.by_columns);
  out.by_rows.cols = out.by_columns.rows;
  out.by_columns.cols = out.by_rows.rows;
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, RowPrior<T>& out) {
  read_parts(call, object, name, "(precision, shifts)", out.precision, out.shifts);
}

template <class T>
void read(Call& call, py::handle object, const std::string& name, Measurements<T>& out) {
  ArrayRef<const T, 1> values;
  read_parts(call, object, name, "(operators, values)", out.operators, values);
  require_length(values.shape[0], out.operators.rows, name + "[1]");
  out.values = values.data;
}

// A table, a value by its name, or what pybind11 converts.
template <class V>
void read(Call& call, py::handle object, const std::string& name, V& out) {
  if constexpr (is_table<V>) {
    const py::object dict = convert<py::dict>(object, name, "dict");
    visit_fields(out, [&](const std::string& field, auto& member) {
      using M = std::decay_t<decltype(member)>;
      const py::object value = is_table<M> ? dict : py::object(dict[field.c_str()]);
      if (!may_be_absent<M> || !value.is_none()) read(call, value, field, member);
    });
  } else if constexpr (std::is_enum_v<V>) {
    const auto word = convert<std::string>(object, name, "str");
    const auto& names = names_of(V());
    const auto* found = std::find(std::begin(names), std::end(names), word);
    if (found == std::end(names)) {
      throw py::value_error(name + " is '" + word + "'; wanted one of " + list_names<V>(""));
    }
    out = static_cast<V>(found - names);
  } else {
    out = convert<V>(object, name, annotation<V>.text);
  }
}

// Results.
template <class V>
py::object to_python(const V& value);

inline py::object to_python(const BlockAngle& angle) {
  return py::make_tuple(angle.largest, angle.frobenius);
}

inline py::object to_python(const Isometry& isometry) {
  return py::make_tuple(isometry.scale, isometry.departure, isometry.rigorous);
}

inline py::object to_python(const Result& result) {
  return py::make_tuple(to_python(result.outcome), result.step, result.layer);
}

template <class V>
py::object to_python(const std::optional<V>& value) {
  return value ? to_python(*value) : py::none();
}

template <class V>
py::object to_python(const std::vector<V>& values) {
  if constexpr (std::is_arithmetic_v<V>) {
    return py::array_t<V>(static_cast<py::ssize_t>(values.size()), values.data());
  } else {
    py::list list;
    for (const V& value : values) list.append(to_python(value));
    return std::move(list);
  }
}

template <class V>
py::object to_python(const V& value) {
  if constexpr (is_table<V>) {
    py::dict made;
    visit_fields(value, [&](const std::string& name, const auto& member) {
      if constexpr (is_table<std::decay_t<decltype(member)>>) {
        made.attr("update")(to_python(member));
      } else {
        made[name.c_str()] = to_python(member);
      }
    });
    return std::move(made);
  } else if constexpr (std::is_enum_v<V>) {
    return py::str(names_of(value)[static_cast<std::size_t>(value)]);
  } else {
    return py::cast(value);
  }
}

}  // namespace dlnfast::python
