// SPDX-License-Identifier: MIT
// Dictionaries that cross the boundary. A table is a struct that lists its fields (dlnfast/fields.hpp): Reader
// fills them from a dictionary, Writer makes one, Describer annotates them for the stub.
#pragma once

#include "call.hpp"
#include "dlnfast/branches.hpp"
#include "dlnfast/fields.hpp"

namespace dlnfast::python {

template <class V, class = void>
constexpr bool is_table = false;
template <class V>
constexpr bool is_table<V, std::void_t<decltype(V::struct_name)>> = true;

// A table in a dictionary of its own.
template <class Table>
struct Nested : Table {};

// Calls visit(name, member) for each field.
template <class Table, class Visitor>
void visit_fields(Table& table, Visitor& visit) {
  auto name = Table::field_names().begin();
  std::apply([&](auto&... member) { (visit(*name++, member), ...); }, table.fields());
}

struct Reader {
  Call& call;
  const py::dict& given;

  template <class V>
  void operator()(const std::string& name, V& member) {
    if constexpr (is_table<V>) {
      visit_fields(member, *this);
    } else {
      read(call, py::object(given[name.c_str()]), name, member);
    }
  }
  template <class Table>
  void operator()(const std::string& name, Nested<Table>& member) {
    const py::dict inner = given[name.c_str()];
    Reader reader{call, inner};
    visit_fields<Table>(member, reader);
  }
};

template <class Table>
Table read_table(Call& call, const py::dict& given) {
  Table table;
  Reader reader{call, given};
  visit_fields(table, reader);
  return table;
}

struct Writer {
  py::dict made;

  template <class V>
  void operator()(const std::string& name, V& member) {
    if constexpr (is_table<V>) {
      visit_fields(member, *this);
    } else if constexpr (std::is_enum_v<V>) {
      made[name.c_str()] = names_of(member)[static_cast<std::size_t>(member)];
    } else {
      made[name.c_str()] = member;
    }
  }
  template <class E>
  void operator()(const std::string& name, const std::vector<E>& member) {
    made[name.c_str()] = to_array(member);
  }
  void operator()(const std::string& name, const BlockAngle& angle) {
    made[name.c_str()] = py::make_tuple(angle.largest, angle.frobenius);
  }
};

template <class Table>
py::dict to_dict(const Table& table) {
  Writer writer;
  visit_fields(table, writer);
  return writer.made;
}

// Annotations in the stub. Arrays of float stand for either precision.
inline std::string annotation(const bool*) { return "bool"; }
inline std::string annotation(const int*) { return "int"; }
inline std::string annotation(const double*) { return "float"; }
inline std::string annotation(const Index*) { return "int"; }
inline std::string annotation(const std::uint64_t*) { return "int"; }
inline std::string annotation(const std::string*) { return "str"; }
inline std::string annotation(const BlockAngle*) { return "tuple[float, float]"; }
inline std::string annotation(const py::object*) { return "Callable[..., object] | None"; }
template <class E, int n>
std::string annotation(const View<E, n>*) {
  if (std::is_same_v<std::remove_const_t<E>, float>) return "_Array";
  return std::string("npt.NDArray[np.") + (std::is_integral_v<E> ? "int64" : "float64") + "]";
}
template <class E>
std::string annotation(const MatrixRef<E>*) {
  return annotation(static_cast<View<E, 2>*>(nullptr)) + " | None";
}
template <class E>
std::string annotation(const Stack<E>*) {
  return annotation(static_cast<View<E, 3>*>(nullptr)) + " | None";
}
template <class T>
std::string annotation(const ObservedEntries<T>*) {
  return "tuple[_SparseRows, _SparseRows]";
}
template <class T>
std::string annotation(const Measurements<T>*) {
  return "tuple[_Array, _Array]";
}
template <class... V>
std::string annotation(const std::tuple<V...>*);
template <class V>
std::string annotation(const std::vector<V>*) {
  return "Sequence[" + annotation(static_cast<V*>(nullptr)) + "]";
}
template <class E>
std::string annotation(const std::vector<MatrixRef<E>>*) {
  return annotation(static_cast<std::vector<View<E, 2>>*>(nullptr));
}
template <class V>
std::string annotation(const std::optional<V>*) {
  return annotation(static_cast<V*>(nullptr)) + " | None";
}
template <class... V>
std::string annotation(const std::tuple<V...>*) {
  std::string list;
  ((list += (list.empty() ? "" : ", ") + annotation(static_cast<V*>(nullptr))), ...);
  return "tuple[" + list + "]";
}

struct Describer {
  py::list included;
  py::dict annotations;
  bool is_result = false;  // which holds lists of numbers as arrays

  template <class V>
  void operator()(const std::string& name, V& member) {
    if constexpr (is_table<V>) {
      included.append(V::struct_name);
    } else if constexpr (std::is_enum_v<V>) {
      std::string list;
      for (const char* one : names_of(member))
        list += (list.empty() ? "\"" : ", \"") + std::string(one) + '"';
      annotations[name.c_str()] = "Literal[" + list + "]";
    } else {
      annotations[name.c_str()] = annotation(&member);
    }
  }
  template <class E>
  std::enable_if_t<std::is_arithmetic_v<E>> operator()(const std::string& name,
                                                       std::vector<E>& member) {
    const View<E, 1> array;
    annotations[name.c_str()] = is_result ? annotation(&array) : annotation(&member);
  }
  template <class Table>
  void operator()(const std::string& name, Nested<Table>&) {
    annotations[name.c_str()] = Table::struct_name;
  }
};

// Adds {name: (tables that it includes, {field: annotation})}.
template <class Table>
void describe(py::dict& tables, bool is_result = false) {
  Table table;
  Describer describer;
  describer.is_result = is_result;
  visit_fields(table, describer);
  tables[Table::struct_name] = py::make_tuple(describer.included, describer.annotations);
}

}  // namespace dlnfast::python
