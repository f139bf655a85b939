// SPDX-License-Identifier: MIT
#include "gram_certificate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.hpp"
#include "cholesky.hpp"
#include "gram_matrix.hpp"
#include "lower_product.hpp"
#include "views.hpp"

using namespace dlnfast;
using check::random_matrix;
using check::random_orthonormal;

namespace {

constexpr double epsilon = std::numeric_limits<double>::epsilon();

double lower_difference(const Matrix<double>& a, const Matrix<double>& b) {
  double largest = 0.0;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j <= i; ++j) largest = std::max(largest, std::abs(a(i, j) - b(i, j)));
  }
  return largest;
}

void lower_triangles_are_those_of_whole_products() {
  for (const int n_threads : {1, 2, 7}) {
    Context context;
    context.n_threads = n_threads;
    for (const Index n : {1, 2, 63, 64, 129, 257, 401}) {
      for (const Index depth : {1, 5, 130}) {
        const Matrix<double> rows = random_matrix<double>(n, depth);
        const Matrix<double> columns = rows.transpose();
        Matrix<double> c = random_matrix<double>(n, n);
        c = (c + c.transpose()).eval();
        const Matrix<double> wanted = 0.5 * c - 2.0 * rows * columns;
        Matrix<double> by_rows = c, by_columns = c;
        multiply_lower(-2.0, view(rows), view(rows), Op::none, 0.5, MatrixRef<double>(by_rows),
                       context);
        multiply_lower(-2.0, view(columns), view(columns), Op::transpose, 0.5,
                       MatrixRef<double>(by_columns), context);
        const double bound = 8.0 * epsilon * static_cast<double>(depth + 4) * 16.0;
        CHECK(lower_difference(by_rows, wanted) <= bound);
        CHECK(lower_difference(by_columns, wanted) <= bound);
      }
    }
  }
}

template <class T>
void gram_matrices_are_those_of_the_smaller_side() {
  const Context context;
  for (const auto& [m, n] :
       {std::pair<Index, Index>{1, 1}, {3, 7}, {130, 40}, {70, 2100}, {2100, 70}}) {
    const Matrix<T> w = random_matrix<T>(m, n);
    const Matrix<double> exact = w.template cast<double>();
    const Matrix<double> wanted = m <= n ? Matrix<double>(4.0 * exact * exact.transpose())
                                         : Matrix<double>(4.0 * exact.transpose() * exact);
    Matrix<double> gram;
    lower_gram<T>(view(w), 2.0, gram, context);
    CHECK(lower_difference(gram, wanted) <= epsilon * wanted.trace());
    mirror_lower(gram);
    CHECK(gram == gram.transpose());
  }
}

// A diagonal shift moves the least eigenvalue across zero.
void positive_definite_matrices_are_recognised() {
  for (const int n_threads : {1, 2, 7}) {
    Context context;
    context.n_threads = n_threads;
    for (const Index n : {1, 2, 31, 64, 65, 128, 200, 331}) {
      Matrix<double> q = random_orthonormal(n, n);
      Matrix<double> scaled = q;
      for (Index i = 0; i < n; ++i)
        scaled.row(i) *= static_cast<double>(i);  // eigenvalues 0 .. n - 1
      const Matrix<double> a = q.transpose() * scaled;
      for (const double shift : {-1e-9, 1e-9, 0.5}) {
        Matrix<double> shifted = a;
        shifted.diagonal().array() += shift;
        shifted.triangularView<Eigen::StrictlyUpper>().fill(std::nan(""));  // not read
        CHECK(is_positive_definite(MatrixRef<double>(shifted), context) == (shift > 0.0));
      }
    }
  }
  Matrix<double> bad = Matrix<double>::Identity(70, 70);
  bad(69, 3) = std::nan("");
  CHECK(!is_positive_definite(MatrixRef<double>(bad), Context()));
}

// tau is certified exactly if it is above the next value, whatever the pairs are.
template <class T>
void complements_are_bounded() {
  const Context context;
  // Of the entries of W, and of the certificate, relative.
  const double rounding = 64.0 * static_cast<double>(std::numeric_limits<T>::epsilon()) + 1e-10;
  for (const auto& [m, n] : {std::pair<Index, Index>{40, 40}, {30, 200}, {200, 30}, {150, 140}}) {
    const Index q = std::min(m, n);
    const Matrix<double> u = random_orthonormal(q, m), v = random_orthonormal(q, n);
    Matrix<double> scaled = u;
    SingularPairs<T> pairs;
    for (Index i = 0; i < q; ++i) {
      pairs.values.push_back(1.0 - 0.5 * static_cast<double>(i) / static_cast<double>(q));
      scaled.row(i) *= pairs.values.back();
    }
    const Matrix<T> w = (0.25 * scaled.transpose() * v).template cast<T>();
    pairs.left = u.template cast<T>();
    pairs.right = v.template cast<T>();
    for (const Index j : {Index{0}, Index{1}, Index{7}, q - 1}) {
      const double next = pairs.values[j];
      const double bound =
          bound_complement<T>(view(w), 4.0, pairs, j, next * (1.0 + rounding), context);
      CHECK(bound >= next && bound <= next * (1.0 + 2.0 * rounding));
      CHECK(std::isinf(
          bound_complement<T>(view(w), 4.0, pairs, j, next * (1.0 - rounding), context)));
    }
    // Pairs that are none: the complement of one random vector has the largest value or the second one.
    const double largest = bound_complement<T>(view(w), 4.0, pairs, 0, 1.01, context);
    CHECK(std::isfinite(largest));
    SingularPairs<T> wrong = pairs;
    wrong.left = random_orthonormal(1, m).template cast<T>();
    wrong.right = random_orthonormal(1, n).template cast<T>();
    CHECK(std::isinf(bound_complement<T>(view(w), 4.0, wrong, 1, 0.9 * pairs.values[1], context)));
    CHECK(std::isfinite(bound_complement<T>(view(w), 4.0, wrong, 1, 1.01, context)));
  }
}

}  // namespace

int main() {
  lower_triangles_are_those_of_whole_products();
  gram_matrices_are_those_of_the_smaller_side<float>();
  gram_matrices_are_those_of_the_smaller_side<double>();
  positive_definite_matrices_are_recognised();
  complements_are_bounded<float>();
  complements_are_bounded<double>();
  return check::result();
}
