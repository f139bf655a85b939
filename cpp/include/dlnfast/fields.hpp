// SPDX-License-Identifier: MIT
// The names of a struct's members, listed once, for whoever converts it.
#pragma once

#include <string>
#include <tuple>
#include <vector>

namespace dlnfast {

inline std::vector<std::string> split_names(const std::string& names) {
  std::vector<std::string> list(1);
  for (const char c : names) {
    if (c == ',') {
      list.emplace_back();
    } else if (c != ' ') {
      list.back() += c;
    }
  }
  return list;
}

// Inside a struct: what it is called, and its members that are fields. A member with fields of its own adds
// them to these.
#define DLNFAST_FIELDS(name, ...)                                           \
  static constexpr char struct_name[] = name;                               \
  static const std::vector<std::string>& field_names() {                    \
    static const std::vector<std::string> list = split_names(#__VA_ARGS__); \
    return list;                                                            \
  }                                                                         \
  auto fields() { return std::tie(__VA_ARGS__); }                           \
  auto fields() const { return std::tie(__VA_ARGS__); }

}  // namespace dlnfast
