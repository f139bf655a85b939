// SPDX-License-Identifier: MIT
// Checks that count failures, and matrices shared by the tests.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "dlnfast/types.hpp"

namespace check {

inline int failures = 0;

inline void fail(const char* file, int line, const char* what) {
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what);
}

inline void near(double got, double wanted, double tolerance, const char* file, int line,
                 const char* what) {
  if (std::abs(got - wanted) <= tolerance) return;  // false for NaN
  fail(file, line, what);
  if (failures <= 20) {
    std::fprintf(stderr, "    %.17g, wanted %.17g within %.3g\n", got, wanted, tolerance);
  }
}

// The exit status of a test program.
inline int result() {
  if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

#define CHECK(condition) \
  if (!(condition)) check::fail(__FILE__, __LINE__, #condition)
#define CHECK_NEAR(got, wanted, tolerance) \
  check::near(got, wanted, tolerance, __FILE__, __LINE__, #got " is near " #wanted)
#define CHECK_THROWS(expression, Type)                                                  \
  do {                                                                                  \
    bool thrown = false;                                                                \
    try {                                                                               \
      expression;                                                                       \
    } catch (const Type&) {                                                             \
      thrown = true;                                                                    \
    } catch (...) {                                                                     \
    }                                                                                   \
    if (!thrown) check::fail(__FILE__, __LINE__, #expression " does not throw " #Type); \
  } while (false)

using dlnfast::Index;
using dlnfast::Matrix;
using dlnfast::MatrixRef;

// Tolerance for the rounding error of a sum of `inner` products of numbers near 1, repeated over
// `steps` steps.
template <class T>
double tolerance(Index inner, double steps = 1.0) {
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  return 8.0 * epsilon * std::sqrt(static_cast<double>(inner) + 1.0) * steps;
}

inline std::mt19937_64& generator() {
  static std::mt19937_64 engine(20240607);
  return engine;
}

inline double uniform() {  // in [-1, 1)
  return static_cast<double>(generator()() >> 11) * 0x1p-52 - 1.0;
}

inline Index pick(Index n) {
  return static_cast<Index>(generator()() % static_cast<std::uint64_t>(n));
}

template <class T>
Matrix<T> random_matrix(Index rows, Index cols, double scale = 1.0) {
  Matrix<T> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<T>(scale * uniform());
  return m;
}

// Returns orthonormal columns (or rows, if the matrix is wide), by Gram-Schmidt with
// reorthogonalisation.
inline Matrix<double> random_orthonormal(Index rows, Index cols) {
  if (rows < cols) return random_orthonormal(cols, rows).transpose();
  Matrix<double> q = random_matrix<double>(rows, cols);
  for (Index j = 0; j < cols; ++j) {
    for (int pass = 0; pass < 2; ++pass) {
      for (Index i = 0; i < j; ++i) q.col(j) -= q.col(i).dot(q.col(j)) * q.col(i).eval();
    }
    q.col(j) /= q.col(j).norm();
  }
  return q;
}

// A matrix inside a larger buffer, which detects writes outside the matrix.
template <class T>
class Strided {
 public:
  Strided(const Matrix<T>& m, Index gap)
      : rows_(m.rows()),
        cols_(m.cols()),
        stride_(m.cols() + gap),
        data_(1 + rows_ * stride_, guard) {
    ref().map() = m;
  }
  MatrixRef<T> ref() { return {data_.data(), rows_, cols_, stride_}; }
  Matrix<T> value() { return ref().map(); }
  bool is_intact() const {
    for (Index i = 0; i < static_cast<Index>(data_.size()); ++i) {
      const bool inside = i < rows_ * stride_ && i % stride_ < cols_;
      if (!inside && data_[static_cast<std::size_t>(i)] != guard) return false;
    }
    return true;
  }

 private:
  static constexpr T guard = T(12345);
  Index rows_, cols_, stride_;
  std::vector<T> data_;
};

// Returns the largest difference of two matrices; NaN if either has a NaN.
template <class A, class B>
double distance(const A& a, const B& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) return std::numeric_limits<double>::infinity();
  double most = 0.0;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      const double d = std::abs(static_cast<double>(a(i, j)) - static_cast<double>(b(i, j)));
      if (!(d <= most)) most = d;
    }
  }
  return most;
}

}  // namespace check
