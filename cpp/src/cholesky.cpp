// SPDX-License-Identifier: MIT
#include "cholesky.hpp"

#include <algorithm>
#include <cmath>

#include "dlnfast/product.hpp"
#include "dlnfast/threads.hpp"
#include "inner_product.hpp"
#include "lower_product.hpp"

namespace dlnfast {
namespace {

constexpr Index small = unsplit_size;  // of a block that is factorised row by row
constexpr double flops_per_thread = 2e6;
constexpr Index bunch = 64;  // rows that one thread solves at a time

// Replaces each row x of b by the solution of y L^T = x.
void solve_rows(MatrixRef<const double> l, MatrixRef<double> b, const Context& context) {
  const Index n = l.rows;
  if (n > small) {
    const Index first = first_half(n), second = n - first;
    const MatrixRef<double> b2 = b.block(0, first, b.rows, second);
    solve_rows(l.block(0, 0, first, first), b.block(0, 0, b.rows, first), context);
    multiply<double>(-1.0, b.block(0, 0, b.rows, first), Op::none, l.block(first, 0, second, first),
                     Op::transpose, 1.0, b2, context);
    solve_rows(l.block(first, first, second, second), b2, context);
    return;
  }
  double columns[small][small], inverse[small];  // of L
  for (Index j = 0; j < n; ++j) {
    inverse[j] = 1.0 / l.row(j)[j];
    for (Index k = j + 1; k < n; ++k) columns[j][k] = l.row(k)[j];
  }
  const int team =
      team_size(context.n_threads, static_cast<double>(b.rows * n * n), flops_per_thread);
  parallel_dynamic(team, (b.rows + bunch - 1) / bunch, [&](Index task) {
    for (Index i = task * bunch; i < std::min(b.rows, (task + 1) * bunch); ++i) {
      double* row = b.row(i);
      for (Index j = 0; j < n; ++j) {
        const double x = row[j] *= inverse[j];
        for (Index k = j + 1; k < n; ++k) row[k] -= x * columns[j][k];
      }
    }
  });
}

bool factor_small(MatrixRef<double> a) {
  for (Index i = 0; i < a.rows; ++i) {
    double* row = a.row(i);
    for (Index j = 0; j < i; ++j) row[j] = (row[j] - inner_product(row, a.row(j), j)) / a.row(j)[j];
    const double pivot = row[i] - inner_product(row, row, i);
    if (!(pivot > 0.0)) return false;
    row[i] = std::sqrt(pivot);
  }
  return true;
}

}  // namespace

bool is_positive_definite(MatrixRef<double> a, const Context& context) {
  const Index n = a.rows;
  if (n <= small) return factor_small(a);
  context.poll();
  const Index first = first_half(n), second = n - first;
  const MatrixRef<double> a21 = a.block(first, 0, second, first);
  const MatrixRef<double> a22 = a.block(first, first, second, second);
  if (!is_positive_definite(a.block(0, 0, first, first), context)) return false;
  solve_rows(a.block(0, 0, first, first), a21, context);
  multiply_lower(-1.0, a21, a21, Op::none, 1.0, a22, context);
  return is_positive_definite(a22, context);
}

}  // namespace dlnfast
