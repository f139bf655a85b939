// SPDX-License-Identifier: MIT
#include "gram_matrix.hpp"

#include <algorithm>
#include <type_traits>

#include "dlnfast/safe_resize.hpp"
#include "lower_product.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

constexpr Index depth = 1024;  // columns (rows) of W that are converted at a time

}  // namespace

template <class T>
void lower_gram(MatrixRef<const T> w, double factor, Matrix<double>& g, const Context& context) {
  const bool is_wide = w.rows <= w.cols;
  const Op op = is_wide ? Op::none : Op::transpose;
  const Index smaller = std::min(w.rows, w.cols), larger = std::max(w.rows, w.cols);
  safe_resize(g, smaller, smaller);
  if (std::is_same_v<T, double> && factor == 1.0) {
    const auto* data = reinterpret_cast<const double*>(w.data);
    const MatrixRef<const double> source(data, w.rows, w.cols, w.stride);
    multiply_lower(1.0, source, source, op, 0.0, MatrixRef<double>(g), context);
    return;
  }
  Matrix<double> part;
  for (Index i = 0; i < larger; i += depth) {
    const Index n = std::min(depth, larger - i);
    const auto source = is_wide ? w.block(0, i, smaller, n) : w.block(i, 0, n, smaller);
    safe_assign(part, factor * source.map().template cast<double>());
    multiply_lower(1.0, view(part), view(part), op, i > 0 ? 1.0 : 0.0, MatrixRef<double>(g),
                   context);
  }
}

void mirror_lower(Matrix<double>& g) {
  for (Index i = 0; i < g.rows(); ++i) {
    for (Index j = 0; j < i; ++j) g(j, i) = g(i, j);
  }
}

template void lower_gram<float>(MatrixRef<const float>, double, Matrix<double>&, const Context&);
template void lower_gram<double>(MatrixRef<const double>, double, Matrix<double>&, const Context&);

}  // namespace dlnfast
