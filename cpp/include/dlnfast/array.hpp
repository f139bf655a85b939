// SPDX-License-Identifier: MIT
// Contiguous arrays that somebody else owns.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <type_traits>

#include "dlnfast/errors.hpp"

namespace dlnfast {

// An array with n axes.
template <class T, int n>
struct ArrayRef {
  T* data = nullptr;
  std::array<Index, n> shape{};

  operator ArrayRef<const T, n>() const { return {data, shape}; }
};

// The entries of a std::vector.
template <class Vector>
auto as_array(Vector& values) {
  using Item = std::remove_pointer_t<decltype(values.data())>;
  return ArrayRef<Item, 1>{values.data(), {static_cast<Index>(values.size())}};
}

// Throws ShapeError unless the first axis has at least `size` entries, and the other axes have these sizes.
template <class T, int n>
void require_room(const ArrayRef<T, n>& array, Index size, const std::array<Index, n - 1>& others,
                  std::string_view name) {
  if (array.shape[0] >= size && std::equal(others.begin(), others.end(), array.shape.begin() + 1))
    return;
  std::string has, wanted = std::to_string(size);
  for (const Index axis : array.shape) has += (has.empty() ? "" : ", ") + std::to_string(axis);
  for (const Index axis : others) wanted += ", " + std::to_string(axis);
  throw ShapeError(std::string(name) + " has the wrong shape, (" + has + "); wanted (" + wanted +
                   "), or more along the first axis");
}

}  // namespace dlnfast
