// SPDX-License-Identifier: MIT
// Gaussian numbers for random starts: the same on every machine, from a seed alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "dlnfast/types.hpp"

namespace dlnfast {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  // Standard normal, by the polar method.
  double normal() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    double x = 0.0, y = 0.0, square = 0.0;
    do {
      x = uniform();
      y = uniform();
      square = x * x + y * y;
    } while (square >= 1.0 || square == 0.0);
    const double factor = std::sqrt(-2.0 * std::log(square) / square);
    spare_ = y * factor;
    has_spare_ = true;
    return x * factor;
  }

  template <class T>
  void fill(MatrixRef<T> m) {
    for (Index i = 0; i < m.rows; ++i) {
      for (Index j = 0; j < m.cols; ++j) m.row(i)[j] = static_cast<T>(normal());
    }
  }

 private:
  // In [-1, 1), from the SplitMix64 sequence.
  double uniform() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    return static_cast<double>(z >> 11) * 0x1p-52 - 1.0;
  }

  std::uint64_t state_;
  double spare_ = 0.0;
  bool has_spare_ = false;
};

}  // namespace dlnfast
