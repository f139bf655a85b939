// SPDX-License-Identifier: MIT
// Standard normal numbers from a seed, equal on all machines.
#pragma once

#include <cmath>
#include <cstdint>

#include "dlnfast/types.hpp"

namespace dlnfast {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // Returns a standard normal number, by the polar method. The method generates pairs: the second
  // number is cached for the next call.
  double normal() {
    if (has_next_) {
      has_next_ = false;
      return next_;
    }
    double x = 0.0, y = 0.0, square = 0.0;
    do {
      x = uniform();
      y = uniform();
      square = x * x + y * y;
    } while (square >= 1.0 || square == 0.0);
    const double factor = std::sqrt(-2.0 * std::log(square) / square);
    next_ = y * factor;
    has_next_ = true;
    return x * factor;
  }

  template <class T>
  void fill(MatrixRef<T> m) {
    for (Index i = 0; i < m.rows; ++i) {
      for (Index j = 0; j < m.cols; ++j) m.row(i)[j] = static_cast<T>(normal());
    }
  }

 private:
  // Returns a uniform number in [-1, 1), from the SplitMix64 sequence.
  double uniform() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
  }

  std::uint64_t state_;
  double next_ = 0.0;
  bool has_next_ = false;
};

}  // namespace dlnfast
