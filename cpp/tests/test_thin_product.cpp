// SPDX-License-Identifier: MIT
#include "dlnfast/thin_product.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::Strided;

namespace {

template <class T>
Matrix<double> to_double(const Matrix<T>& m) {
  return m.template cast<double>();
}

// The five kernels with plain loops, one operation at a time.
template <class T>
struct Reference {
  Matrix<double> row_result, col_result, weight, velocity;

  Reference(const Matrix<T>& left, const Matrix<T>& right, const Matrix<T>& w, const Matrix<T>& v,
            const GradientStep<T>& d, bool momentum)
      : row_result(Matrix<double>::Zero(right.rows(), w.rows())),
        col_result(Matrix<double>::Zero(left.rows(), w.cols())),
        weight(to_double(w)),
        velocity(to_double(v)) {
    for (Index g = 0; g < left.rows(); ++g) {
      for (Index i = 0; i < w.rows(); ++i) {
        for (Index j = 0; j < w.cols(); ++j) {
          row_result(g, i) += double(right(g, j)) * double(w(i, j));
          col_result(g, j) += double(left(g, i)) * double(w(i, j));
        }
      }
    }
    for (Index i = 0; i < w.rows(); ++i) {
      for (Index j = 0; j < w.cols(); ++j) {
        double gradient = 0.0;
        for (Index g = 0; g < left.rows(); ++g)
          gradient += double(left(g, i)) * double(right(g, j));
        double new_velocity = d.scale * gradient + d.weight_decay * double(w(i, j));
        if (momentum) new_velocity += d.momentum * double(v(i, j));
        velocity(i, j) = new_velocity;
        weight(i, j) -= d.learning_rate * new_velocity;
      }
    }
  }
};

template <class T>
void check_case(Index k, Index m, Index n, bool momentum, Index gap, int n_threads) {
  const Context context{n_threads, nullptr};
  const auto left = random_matrix<T>(k, m);
  const auto right = random_matrix<T>(k, n);
  const auto w = random_matrix<T>(m, n);
  const auto v = random_matrix<T>(m, n);
  GradientStep<T> d;
  d.scale = T(0.75);
  d.learning_rate = T(0.25);
  d.weight_decay = T(0.125);
  if (momentum) d.momentum = T(0.5);
  const Reference<T> wanted(left, right, w, v, d, momentum);
  // The partial sums of n terms grow to the root of n, and each of them is rounded.
  const auto of_sum = [](Index n) {
    return check::tolerance<T>(n) * std::max(4.0, 0.1 * std::sqrt(static_cast<double>(n)));
  };
  const double by_rows = of_sum(m), by_cols = of_sum(n);
  const double update = check::tolerance<T>(k);

  Strided<T> sl(left, gap), sr(right, gap), sw(w, gap), sv(v, gap);
  const Matrix<T> junk_rows = Matrix<T>::Constant(k, m, std::numeric_limits<T>::quiet_NaN());
  const Matrix<T> junk_cols = Matrix<T>::Constant(k, n, std::numeric_limits<T>::quiet_NaN());

  Strided<T> y_rows(junk_rows, gap), y_cols(junk_cols, gap);
  thin_times_transpose<T>(sr.ref(), sw.ref(), y_rows.ref(), context);
  CHECK_NEAR(distance(y_rows.value(), wanted.row_result), 0.0, by_cols);
  thin_times<T>(sl.ref(), sw.ref(), y_cols.ref(), context);
  CHECK_NEAR(distance(y_cols.value(), wanted.col_result), 0.0, by_rows);
  CHECK(distance(sw.value(), w) == 0.0);
  CHECK(y_rows.is_intact() && y_cols.is_intact() && sw.is_intact());

  for (int kind = 0; kind < 3; ++kind) {
    Strided<T> stepped(w, gap), velocity(v, gap), rows(junk_rows, gap), cols(junk_cols, gap);
    GradientStep<T> step = d;
    if (momentum) step.velocity = velocity.ref();
    if (kind == 0) {
      thin_times_transpose_and_descend<T>(sl.ref(), sr.ref(), stepped.ref(), rows.ref(), step,
                                          context);
      CHECK_NEAR(distance(rows.value(), wanted.row_result), 0.0, by_cols);
    } else if (kind == 1) {
      thin_times_and_descend<T>(sl.ref(), sr.ref(), stepped.ref(), cols.ref(), step, context);
      CHECK_NEAR(distance(cols.value(), wanted.col_result), 0.0, by_rows);
    } else {
      thin_descend<T>(sl.ref(), sr.ref(), stepped.ref(), step, context);
    }
    CHECK_NEAR(distance(stepped.value(), wanted.weight), 0.0, update);
    CHECK_NEAR(distance(velocity.value(), momentum ? wanted.velocity : to_double(v)), 0.0, update);
    CHECK(stepped.is_intact() && velocity.is_intact() && rows.is_intact() && cols.is_intact());
  }
}

template <class T>
void all_shapes_match_reference() {
  const std::vector<Index> sizes{0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 64, 65, 100, 131};
  const int teams[] = {1, 2, 7, 0};
  std::size_t turn = 0;
  for (Index k = 0; k <= thin_limit; ++k) {
    for (const Index m : sizes) {
      const Index n = sizes[(turn * 7 + static_cast<std::size_t>(k)) % sizes.size()];
      check_case<T>(k, m, n, turn % 2 == 0, turn % 3 == 0 ? 0 : 3, teams[turn / 2 % 4]);
      ++turn;
    }
  }
  // More columns than a tile, more rows than a memory page.
  for (const Index k : {1, 5, 16, 64}) {
    check_case<T>(k, 3, 9001, true, 1, 2);
    check_case<T>(k, 131, 700, true, 0, 7);
    check_case<T>(k, 700, 131, false, 2, 7);
  }
}

// A matrix without rows may have no data. The weights decay nevertheless.
template <class T>
void weights_decay_without_gradient() {
  for (const bool momentum : {false, true}) {
    Matrix<T> left(0, 9), right(0, 11), rows(0, 9), cols(0, 11);
    const Matrix<T> w = random_matrix<T>(9, 11), v = random_matrix<T>(9, 11);
    for (int kind = 0; kind < 3; ++kind) {
      Matrix<T> stepped = w, velocity = v;
      GradientStep<T> d;
      d.learning_rate = T(0.5);
      d.weight_decay = T(0.25);
      if (momentum) {
        d.momentum = T(0.5);
        d.velocity = velocity;
      }
      if (kind == 0) {
        thin_times_transpose_and_descend<T>(left, right, stepped, rows, d, Context{});
      } else if (kind == 1) {
        thin_times_and_descend<T>(left, right, stepped, cols, d, Context{});
      } else {
        thin_descend<T>(left, right, stepped, d, Context{});
      }
      Matrix<T> wanted = w - T(0.125) * w;
      if (momentum) wanted -= T(0.25) * v;
      CHECK_NEAR(distance(stepped, wanted), 0.0, check::tolerance<T>(1));
    }
  }
}

template <class T>
void sizes_are_checked() {
  const Context context;
  Matrix<T> w(6, 7), rows(3, 6), cols(3, 7), none;
  Matrix<T> thick_rows(thin_limit + 1, 6), thick_cols(thin_limit + 1, 7);
  CHECK_THROWS(thin_times_transpose<T>(rows, w, rows, context), ShapeError);
  CHECK_THROWS(thin_times_transpose<T>(cols, w, cols, context), ShapeError);
  CHECK_THROWS(thin_times_transpose<T>(cols, w, none, context), ShapeError);
  CHECK_THROWS(thin_times_transpose<T>(thick_cols, w, thick_rows, context), ShapeError);
  CHECK_THROWS(thin_times<T>(cols, w, cols, context), ShapeError);
  CHECK_THROWS(thin_times<T>(rows, w, rows, context), ShapeError);
  CHECK_THROWS(thin_times<T>(rows, w, none, context), ShapeError);
  CHECK_THROWS(thin_times<T>(thick_rows, w, thick_cols, context), ShapeError);

  const GradientStep<T> d;
  Matrix<T> two_cols(2, 7);
  CHECK_THROWS(thin_descend<T>(cols, cols, w, d, context), ShapeError);
  CHECK_THROWS(thin_descend<T>(rows, two_cols, w, d, context), ShapeError);
  CHECK_THROWS(thin_descend<T>(thick_rows, thick_cols, w, d, context), ShapeError);
  GradientStep<T> with_velocity = d;
  with_velocity.velocity = cols;
  CHECK_THROWS(thin_descend<T>(rows, cols, w, with_velocity, context), ShapeError);
  GradientStep<T> without_velocity = d;
  without_velocity.momentum = T(0.5);
  CHECK_THROWS(thin_descend<T>(rows, cols, w, without_velocity, context), ShapeError);
  CHECK_THROWS(thin_times_and_descend<T>(rows, cols, w, rows, d, context), ShapeError);
  CHECK_THROWS(thin_times_and_descend<T>(rows, two_cols, w, cols, d, context), ShapeError);
  CHECK_THROWS(thin_times_and_descend<T>(rows, cols, w, none, d, context), ShapeError);
  CHECK_THROWS(thin_times_transpose_and_descend<T>(rows, cols, w, cols, d, context), ShapeError);
  CHECK_THROWS(thin_times_transpose_and_descend<T>(rows, two_cols, w, rows, d, context),
               ShapeError);
  CHECK_THROWS(thin_times_transpose_and_descend<T>(rows, cols, w, none, d, context), ShapeError);
}

}  // namespace

int main() {
  all_shapes_match_reference<double>();
  all_shapes_match_reference<float>();
  weights_decay_without_gradient<double>();
  weights_decay_without_gradient<float>();
  sizes_are_checked<double>();
  sizes_are_checked<float>();
  return check::result();
}
