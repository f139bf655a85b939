// SPDX-License-Identifier: MIT
#include "dlnfast/linear_operator.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

#include "dlnfast/descent.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "inner_product.hpp"

namespace dlnfast {
namespace {

constexpr double entries_per_thread = 65536;
constexpr Index rows_per_chunk = 16;

double inner_product_of_rows(const double* a, const double* b, Index n) {
  return inner_product(a, b, n);
}

double inner_product_of_rows(const float* a, const float* b, Index n) {
  double sums[8] = {};
  Index j = 0;
  for (; j + 8 <= n; j += 8) {
    for (Index i = 0; i < 8; ++i) {
      sums[i] += static_cast<double>(a[j + i]) * static_cast<double>(b[j + i]);
    }
  }
  double total = 0.0;
  for (const double s : sums) total += s;
  for (; j < n; ++j) total += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  return total;
}

// Returns ||a - b||^2 and the sum of |a_i - b_i|, and copies a to b.
template <class T>
std::array<double, 2> replace_row(T* b, const T* a, Index n) {
  double squares[8] = {}, sizes[8] = {};
  const auto replace = [&](Index j, Index i) {
    const double difference = static_cast<double>(a[j]) - static_cast<double>(b[j]);
    squares[i] += difference * difference;
    sizes[i] += std::abs(difference);
    b[j] = a[j];
  };
  Index j = 0;
  for (; j + 8 <= n; j += 8) {
    for (Index i = 0; i < 8; ++i) replace(j + i, i);
  }
  for (; j < n; ++j) replace(j, 0);
  std::array<double, 2> total{};
  for (Index i = 0; i < 8; ++i) {
    total[0] += squares[i];
    total[1] += sizes[i];
  }
  return total;
}

// Sums of_row(i), N numbers, over chunks of rows and then over the chunks in order, so that the
// result does not depend on the number of threads.
template <std::size_t N, class OfRow>
std::array<double, N> sum_over_rows(Index rows, Index cols, const Context& context,
                                    const OfRow& of_row) {
  const Index n_chunks = (rows + rows_per_chunk - 1) / rows_per_chunk;
  std::vector<std::array<double, N>> partial(static_cast<std::size_t>(n_chunks));
  int team = team_size(context.n_threads, static_cast<double>(rows) * static_cast<double>(cols),
                       entries_per_thread);
  team = static_cast<int>(std::min<Index>(team, std::max<Index>(n_chunks, 1)));
  parallel_dynamic(team, n_chunks, [&](Index chunk) {
    std::array<double, N> sum{};
    const Index end = std::min((chunk + 1) * rows_per_chunk, rows);
    for (Index i = chunk * rows_per_chunk; i < end; ++i) {
      const std::array<double, N> row = of_row(i);
      for (std::size_t k = 0; k < N; ++k) sum[k] += row[k];
    }
    partial[chunk] = sum;
  });
  std::array<double, N> total{};
  for (const auto& p : partial) {
    for (std::size_t k = 0; k < N; ++k) total[k] += p[k];
  }
  return total;
}

}  // namespace

template <class T>
double inner_product(MatrixRef<const T> a, MatrixRef<const T> b, const Context& context) {
  require_shape(b, a.rows, a.cols, "the second matrix of an inner product");
  return sum_over_rows<1>(a.rows, a.cols, context, [&](Index i) {
    return std::array<double, 1>{inner_product_of_rows(a.row(i), b.row(i), a.cols)};
  })[0];
}

template <class T>
double squared_norm(MatrixRef<const T> w, const Context& context) {
  return inner_product<T>(w, w, context);
}

template <class T>
double norm(MatrixRef<const T> w, const Context& context) {
  const double square = squared_norm<T>(w, context);
  if (is_exact_square(square)) return std::sqrt(square);
  const double largest = largest_magnitude<T>(w);
  if (largest == 0.0 || !std::isfinite(largest)) return largest;
  // Products with powers of two are exact; the power and its inverse must be finite.
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = std::clamp(exponent, -1000, 1000);
  const double factor = std::ldexp(1.0, -exponent);
  const double scaled = sum_over_rows<1>(w.rows, w.cols, context, [&](Index i) {
    double sum = 0.0;
    for (Index j = 0; j < w.cols; ++j) {
      const double x = factor * static_cast<double>(w.row(i)[j]);
      sum += x * x;
    }
    return std::array<double, 1>{sum};
  })[0];
  return std::ldexp(std::sqrt(scaled), exponent);
}

template <class T>
double replace_and_measure(MatrixRef<T> copy, MatrixRef<const T> w, const Context& context) {
  require_shape(copy, w.rows, w.cols, "the copy of a matrix");
  const auto [square, size] = sum_over_rows<2>(
      w.rows, w.cols, context, [&](Index i) { return replace_row(copy.row(i), w.row(i), w.cols); });
  if (size == 0.0) return 0.0;
  return is_exact_square(square) ? std::sqrt(square) : std::numeric_limits<double>::infinity();
}

template <class T>
NormAndProduct norm_and_product(MatrixRef<const T> w, MatrixRef<const T> b,
                                const Context& context) {
  require_shape(b, w.rows, w.cols, "the second matrix of an inner product");
  // The second product reads the row from the first-level cache.
  const auto both = sum_over_rows<2>(w.rows, w.cols, context, [&](Index i) {
    return std::array<double, 2>{inner_product_of_rows(w.row(i), w.row(i), w.cols),
                                 inner_product_of_rows(w.row(i), b.row(i), w.cols)};
  });
  return {both[0], both[1]};
}

template double replace_and_measure<float>(MatrixRef<float>, MatrixRef<const float>,
                                           const Context&);
template double replace_and_measure<double>(MatrixRef<double>, MatrixRef<const double>,
                                            const Context&);
template NormAndProduct norm_and_product<float>(MatrixRef<const float>, MatrixRef<const float>,
                                                const Context&);
template NormAndProduct norm_and_product<double>(MatrixRef<const double>, MatrixRef<const double>,
                                                 const Context&);
template double norm<float>(MatrixRef<const float>, const Context&);
template double norm<double>(MatrixRef<const double>, const Context&);
template double inner_product<float>(MatrixRef<const float>, MatrixRef<const float>,
                                     const Context&);
template double inner_product<double>(MatrixRef<const double>, MatrixRef<const double>,
                                      const Context&);
template double squared_norm<float>(MatrixRef<const float>, const Context&);
template double squared_norm<double>(MatrixRef<const double>, const Context&);

}  // namespace dlnfast
