// SPDX-License-Identifier: MIT
// Special values of floating-point arithmetic, and the square.
#pragma once

#include <limits>

namespace dlnfast {

inline constexpr double infinity = std::numeric_limits<double>::infinity();
inline constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// The distance from 1 to the next number of type T.
template <class T>
constexpr double epsilon() {
  return static_cast<double>(std::numeric_limits<T>::epsilon());
}

inline double square(double x) { return x * x; }

}  // namespace dlnfast
