// SPDX-License-Identifier: MIT
#include "gram_decomposition.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "dlnfast/singular_values.hpp"
#include "views.hpp"

using namespace dlnfast;
using check::random_matrix;
using check::random_orthonormal;

namespace {

constexpr double epsilon = std::numeric_limits<double>::epsilon();

// W = U diag(s) V^T, m x n, with s_i = spectrum(i).
template <class Spectrum>
Matrix<double> make_matrix(Index m, Index n, const Spectrum& spectrum) {
  const Index q = std::min(m, n);
  Matrix<double> u = random_orthonormal(q, m), v = random_orthonormal(q, n);
  for (Index i = 0; i < q; ++i) u.row(i) *= spectrum(i);
  return u.transpose() * v;
}

std::vector<Matrix<double>> matrices(Index m, Index n) {
  return {
      make_matrix(m, n, [](Index) { return 1.0; }),                            // all values equal
      make_matrix(m, n, [](Index i) { return i < 2 ? 1.0 - 0.5 * i : 0.0; }),  // rank 2
      make_matrix(m, n, [](Index i) { return std::pow(0.5, i); }),
      make_matrix(m, n, [](Index i) { return i < 3 ? 1.0 : 1e-7 * (1.0 + i); }),
      Matrix<double>(random_matrix<double>(m, n) / std::sqrt(static_cast<double>(m + n))),
      Matrix<double>(Matrix<double>::Zero(m, n)),
  };
}

// Eigenvalues and vectors satisfy A x = c x, and the vectors are orthonormal.
void eigenpairs_satisfy_their_equation() {
  Random random(5);
  for (const Index n : {1, 2, 3, 7, 31, 64, 130}) {
    for (const Matrix<double>& w : matrices(n, n)) {
      for (const Index p : {Index{1}, std::min<Index>(n, 9), n}) {
        const Matrix<double> a = w * w.transpose();
        Matrix<double> reflections = a;
        SymmetricEigen eigen;
        eigen.find_values(reflections, p);
        eigen.find_vectors(reflections, random);
        const Matrix<double>& x = eigen.vectors();
        Matrix<double> residual = x * a;
        for (Index i = 0; i < p; ++i) residual.row(i) -= eigen.values()[i] * x.row(i);
        const double bound = 64.0 * epsilon * (1.0 + std::sqrt(static_cast<double>(n)));
        CHECK(residual.cwiseAbs().maxCoeff() <= bound * std::max(a.norm(), 1e-300));
        const Matrix<double> identity = Matrix<double>::Identity(p, p);
        CHECK((x * x.transpose() - identity).cwiseAbs().maxCoeff() <= bound);
        CHECK(std::is_sorted(eigen.values().rbegin(), eigen.values().rend()));
      }
    }
  }
}

// Values are within their bounds of the SVD, the first k within the tolerance, and W^T u = s v.
void values_are_within_their_bounds() {
  const Context context;
  const Index shapes[][2] = {{1, 1},  {1, 9},   {9, 1},    {7, 31},
                             {31, 7}, {64, 64}, {60, 130}, {130, 60}};
  for (const auto& [m, n] : shapes) {
    for (const Matrix<double>& w : matrices(m, n)) {
      const Index smaller = std::min(m, n);
      Matrix<double> exact(1, smaller), none;
      singular_values<double>(view(w), MatrixRef<double>(exact), {}, {}, context);
      for (const auto& [p, tolerance] :
           {std::pair<Index, double>{std::min<Index>(smaller, 12), 1e-5},
            {std::min<Index>(smaller, 12), 1e-10},
            {smaller, 1e-5}}) {
        GramDecomposition gram;
        const Index k = std::max<Index>(1, p - 3);
        gram.compute<double>(view(w), p, k, tolerance, true, context);
        const double rounding = 64.0 * epsilon * exact(0, 0);
        for (Index i = 0; i < p; ++i) {
          CHECK(std::abs(gram.values()[i] - exact(0, i)) <= gram.errors()[i] + rounding);
          if (i < k) CHECK(gram.errors()[i] <= tolerance * exact(0, 0) + 1e-150);
        }
        const Matrix<double>&u = gram.left(), &v = gram.right();
        CHECK(u.rows() == p && u.cols() == m && v.rows() == p && v.cols() == n);
        const Matrix<double> identity = Matrix<double>::Identity(p, p);
        CHECK((u * u.transpose() - identity).cwiseAbs().maxCoeff() < 1e-13);
        CHECK((v * v.transpose() - identity).cwiseAbs().maxCoeff() < 1e-13);
        const Matrix<double> found = u * w * v.transpose();
        for (Index i = 0; i < p; ++i) {
          for (Index j = 0; j < p; ++j) {
            const double wanted = i == j ? gram.values()[i] : 0.0;
            CHECK(std::abs(found(i, j) - wanted) <=
                  2.0 * std::max(gram.errors()[i], gram.errors()[j]) + rounding);
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  eigenpairs_satisfy_their_equation();
  values_are_within_their_bounds();
  return check::result();
}
