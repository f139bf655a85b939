// SPDX-License-Identifier: MIT
#include "small_decomposition.hpp"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "dlnfast/singular_values.hpp"
#include "numbers.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

constexpr int max_jacobi_passes = 6;

}  // namespace

SmallDecomposition::SmallDecomposition(const Matrix<double>& r, const Context& context)
    : a(r.rows(), std::min(r.rows(), r.cols())),
      s(1, std::min(r.rows(), r.cols())),
      b(r.cols(), std::min(r.rows(), r.cols())) {
  if (r.rows() == r.cols() && r.rows() <= rotations_limit && decompose_by_rotations(r)) return;
  singular_values<double>(view(r), MatrixRef<double>(s), MatrixRef<double>(a), MatrixRef<double>(b),
                          context);
}

bool rotate_rows(Matrix<double>& rows, Matrix<double>& rotation, int max_passes) {
  const Index p = rows.rows();
  rotation = Matrix<double>::Identity(p, p);
  const double floor = square(1e-15) * rows.squaredNorm();
  bool is_done = false;
  for (int pass = 0; pass < max_passes && !is_done; ++pass) {
    is_done = true;
    for (Index i = 0; i < p; ++i) {
      for (Index j = i + 1; j < p; ++j) {
        const double x = rows.row(i).squaredNorm();
        const double y = rows.row(j).squaredNorm();
        const double z = rows.row(i).dot(rows.row(j));
        if (std::abs(z) <= 1e-15 * std::sqrt(x) * std::sqrt(y) || std::abs(z) <= floor) continue;
        is_done = false;
        const double zeta = (y - x) / (2.0 * z);
        const double t = (zeta >= 0.0 ? 1.0 : -1.0) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1.0 / std::hypot(1.0, t);
        const double d = c * t;
        const auto rotate = [&](Matrix<double>& m) {
          for (Index k = 0; k < m.cols(); ++k) {
            const double first = m(i, k), second = m(j, k);
            m(i, k) = c * first - d * second;
            m(j, k) = d * first + c * second;
          }
        };
        rotate(rows);
        rotate(rotation);
      }
    }
  }
  return is_done;
}

bool SmallDecomposition::decompose_by_rotations(const Matrix<double>& r) {
  const Index p = r.rows();
  Matrix<double> rows = r, rotation;
  if (!rotate_rows(rows, rotation, max_jacobi_passes)) return false;
  std::vector<std::pair<double, Index>> order;
  for (Index i = 0; i < p; ++i) order.push_back({-rows.row(i).norm(), i});
  std::sort(order.begin(), order.end());
  const double largest = -order[0].first;
  // The direction of a row of the size of rounding errors is arbitrary: use the general method.
  if (-order[static_cast<std::size_t>(p) - 1].first <= 1e-13 * largest) return false;
  for (Index i = 0; i < p; ++i) {
    const auto [negative, at] = order[static_cast<std::size_t>(i)];
    s(0, i) = -negative;
    a.col(i) = rotation.row(at).transpose();
    b.col(i) = rows.row(at).transpose() / -negative;
  }
  return true;
}

}  // namespace dlnfast
