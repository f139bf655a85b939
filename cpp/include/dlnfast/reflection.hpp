// SPDX-License-Identifier: MIT
// Reflection: a struct lists its members once, and the bindings convert it to and from a
// dictionary.
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

// Used inside a struct: defines its name and the tuple of its listed members. A listed member that
// has fields of its own contributes its fields to the same dictionary.
#define DLNFAST_FIELDS(name, ...)                                           \
  static constexpr char struct_name[] = name;                               \
  static const std::vector<std::string>& field_names() {                    \
    static const std::vector<std::string> list = split_names(#__VA_ARGS__); \
    return list;                                                            \
  }                                                                         \
  auto fields() { return std::tie(__VA_ARGS__); }                           \
  auto fields() const { return std::tie(__VA_ARGS__); }

}  // namespace dlnfast
