// SPDX-License-Identifier: MIT
#include "gram_decomposition.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "gram_matrix.hpp"
#include "numbers.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Rounding errors of the reflections relative to s epsilon ||G||_F: about one is observed.
constexpr double reflection_errors = 8.0;
// Rounding errors of W minus its leading part, relative to epsilon ||W||_F: twice sqrt(p) at most.
constexpr double projection_errors = 32.0;
// A part ends with the values below this share of its largest one.
constexpr double part_ratio = 1e-2;
constexpr int most_parts = 4;

// As project_out (basis.hpp), which makes an update of a 512 x 128 matrix a tenth slower.
void project_out_rows_above(Matrix<double>& x, Index i) {
  for (Index k = 0; k < i; ++k) x.row(i) -= x.row(i).dot(x.row(k)) * x.row(k);
}

// Makes row i of x orthogonal to the rows above and of length 1. A row that mostly depends on them was lost
// in rounding errors: a random one takes its place.
void orthonormalize_row(Matrix<double>& x, Index i, Random& random) {
  auto row = x.row(i);
  // Of a random row little is left where the rows above span nearly all dimensions.
  double least = 0.5;
  for (int attempt = 0; attempt < 100; ++attempt, least = 1e-6) {
    const double length = row.norm();
    if (length > 0.0) {
      row /= length;
      project_out_rows_above(x, i);
      const double left = row.norm();
      if (left >= least) {
        row /= left;
        project_out_rows_above(x, i);
        row /= row.norm();
        return;
      }
    }
    random.fill(MatrixRef<double>(row.data(), 1, row.size()));
  }
}

}  // namespace

template <class T>
void GramDecomposition::compute(MatrixRef<const T> w, Index p, Index k, double tolerance,
                                bool with_vectors, const Context& context) {
  Random random(0);
  is_wide_ = w.rows <= w.cols;
  safe_assign(w_, w.map().template cast<double>());
  values_.assign(static_cast<std::size_t>(p), 0.0);
  errors_.assign(static_cast<std::size_t>(p), 0.0);
  safe_resize(x_, p, std::min(w.rows, w.cols));
  safe_resize(y_, p, std::max(w.rows, w.cols));
  const double length =
      static_cast<double>(y_.cols()) + reflection_errors * static_cast<double>(x_.cols());
  double inherited = 0.0;  // error (2) of the parts before
  for (Index begin = 0, end = 0, part = 1; begin < p; begin = end, ++part) {
    const double squared_norm = decompose(begin, context);
    const double delta =
        length * epsilon<double>() * squared_norm + std::numeric_limits<double>::min();
    for (Index i = begin; i < p; ++i) {
      const double s = std::sqrt(std::max(eigen_.values()[i - begin], 0.0));
      values_[i] = begin > 0 ? std::min(s, values_[begin - 1]) : s;
      errors_[i] = std::min(std::sqrt(delta), delta / std::max(s, std::sqrt(delta))) + inherited;
    }
    const bool is_last =
        errors_[k - 1] <= tolerance * values_[0] || values_[begin] == 0.0 || part == most_parts;
    end = is_last ? p : begin + 1;
    while (!is_last && end < p && values_[end] >= part_ratio * values_[begin]) ++end;
    if (is_last && !with_vectors) return;
    eigen_.find_vectors(gram_, random);
    x_.middleRows(begin, end - begin) = eigen_.vectors().topRows(end - begin);
    for (Index i = begin > 0 ? begin : p; i < end; ++i) orthonormalize_row(x_, i, random);
    project(begin, end, context);
    for (Index i = begin; with_vectors && i < end; ++i) orthonormalize_row(y_, i, random);
    inherited +=
        delta / values_[end - 1] + projection_errors * epsilon<double>() * std::sqrt(squared_norm);
  }
}

double GramDecomposition::decompose(Index begin, const Context& context) {
  lower_gram<double>(view(w_), 1.0, gram_, context);
  mirror_lower(gram_);
  const double squared_norm = gram_.trace();
  context.poll();
  eigen_.find_values(gram_, static_cast<Index>(values_.size()) - begin);
  return squared_norm;
}

void GramDecomposition::project(Index begin, Index end, const Context& context) {
  const Index n = end - begin;
  const MatrixRef<double> y = MatrixRef<double>(y_).block(begin, 0, n, y_.cols());
  const MatrixRef<const double> x = view(x_).block(begin, 0, n, x_.cols());
  multiply<double>(1.0, x, Op::none, view(w_), is_wide_ ? Op::none : Op::transpose, 0.0, y,
                   context);
  if (end == static_cast<Index>(values_.size())) return;
  const MatrixRef<const double> left = is_wide_ ? x : MatrixRef<const double>(y);
  const MatrixRef<const double> right = is_wide_ ? MatrixRef<const double>(y) : x;
  multiply<double>(-1.0, left, Op::transpose, right, Op::none, 1.0, MatrixRef<double>(w_), context);
}

double GramDecomposition::angle_error(Index j) const {
  if (j == x_.cols()) return 0.0;
  const double error = errors_[j - 1];
  const double gap = j < static_cast<Index>(values_.size()) ? values_[j - 1] - values_[j] : 0.0;
  // Davis and Kahan: the sine is at most delta / (s_j^2 - s_{j+1}^2), less than (delta / s_j) / gap.
  if (gap <= 2.0 * error) return nan;
  return std::sqrt(2.0 * static_cast<double>(j)) * error / (gap - error);
}

template void GramDecomposition::compute<float>(MatrixRef<const float>, Index, Index, double, bool,
                                                const Context&);
template void GramDecomposition::compute<double>(MatrixRef<const double>, Index, Index, double,
                                                 bool, const Context&);

}  // namespace dlnfast
