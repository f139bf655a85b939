// SPDX-License-Identifier: MIT
#include "dlnfast/basis.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::random_orthonormal;

namespace {

// Extends a basis by a block of known rank, partly inside its span.
template <class T>
void check_extension(Index n, Index n_basis, Index rank, Index k, int n_threads) {
  const Matrix<T> all = random_orthonormal(n_basis + rank, n).template cast<T>();
  Matrix<T> mixing = random_matrix<T>(k, rank);
  for (Index i = 0; i < std::min(k, rank); ++i) mixing(i, i) += T(2);
  Matrix<T> block = mixing * all.bottomRows(rank);
  if (n_basis > 0) block += random_matrix<T>(k, n_basis) * all.topRows(n_basis);
  const Matrix<T> whole = block;

  Matrix<T> basis = Matrix<T>::Zero(n_basis + k, n);
  basis.topRows(n_basis) = all.topRows(n_basis);
  std::vector<double> lengths(static_cast<std::size_t>(k) + 1, -1.0);
  const double tiny = check::tolerance<T>(n, 4.0);
  const Context context{n_threads, nullptr};
  const Index added =
      extend_basis<T>(basis, n_basis, block, 30.0 * tiny, as_array(lengths), context);
  CHECK(added == std::min(rank, k));
  const Index total = n_basis + added;
  const Matrix<T> q = basis.topRows(total);
  CHECK_NEAR(distance(Matrix<T>(q * q.transpose()), Matrix<T>::Identity(total, total)), 0.0, tiny);
  // The block is in the span of the basis, and the old rows of the basis are unchanged.
  CHECK_NEAR(distance(Matrix<T>(whole * q.transpose() * q), whole), 0.0, 10.0 * tiny);
  CHECK(distance(Matrix<T>(q.topRows(n_basis)), Matrix<T>(all.topRows(n_basis))) == 0.0);
  for (Index i = 0; i + 1 < added; ++i) CHECK(lengths[i] >= lengths[i + 1] * (1.0 - 1e-3));
  CHECK(lengths[static_cast<std::size_t>(added)] == -1.0);
}

template <class T>
void extends_bases_of_all_shapes() {
  for (const int n_threads : {1, 2, 7}) {
    for (const Index n : {1, 2, 7, 31, 200}) {
      for (const Index n_basis : {0, 1, 5}) {
        for (const Index rank : {0, 1, 3, 8}) {
          if (n_basis + rank > n) continue;
          for (const Index k : {0, 1, 4, 11}) check_extension<T>(n, n_basis, rank, k, n_threads);
        }
      }
    }
  }
}

// A short component outside the span is found, and the new row is orthogonal to rounding.
void small_remainders_are_found() {
  const Matrix<double> all = random_orthonormal(3, 50);
  for (const double size : {1e-3, 1e-6, 1e-9}) {
    Matrix<double> basis = Matrix<double>::Zero(3, 50);
    basis.topRows(2) = all.topRows(2);
    Matrix<double> block = all.row(0) + size * all.row(2);
    std::vector<double> length(3, 0.0);
    CHECK(extend_basis<double>(basis, 2, block, 1e-12, as_array(length), Context{}) == 1);
    CHECK_NEAR(length[0], size, 1e-15);
    CHECK_NEAR(distance(Matrix<double>(basis * basis.transpose()), Matrix<double>::Identity(3, 3)),
               0.0, 1e-15);
  }
}

// A basis of the whole space is not extended.
void full_basis_is_not_extended() {
  Matrix<double> basis(8, 4), block = random_matrix<double>(4, 4);
  basis.topRows(4) = random_orthonormal(4, 4);
  std::vector<double> lengths(4);
  CHECK(extend_basis<double>(basis, 4, block, 0.0, as_array(lengths), Context{}) == 0);
}

// Rows of any lengths and dependence become orthonormal; their span is preserved.
template <class T>
void blocks_become_orthonormal() {
  for (const Index n : {1, 2, 7, 31, 200}) {
    for (const Index k : {0, 1, 2, 7, 24, 31}) {
      for (const Index rank : {0, 1, 5, 31}) {
        for (const double level : {1.0, 1e-30}) {
          if (k > n || rank > k) continue;
          Matrix<T> block = random_matrix<T>(k, rank) * random_matrix<T>(rank, n);
          for (Index i = 0; i < k; ++i)
            block.row(i) *= static_cast<T>(level * std::pow(0.1, i % 7));
          const Matrix<double> before = block.template cast<double>() / level;
          Random random(5);
          const Index found = orthonormalize<T>(block, random, Context{2, nullptr});
          const Matrix<double> q = block.template cast<double>();
          const double tiny = check::tolerance<T>(n, 4.0);
          CHECK(found == (k == 0 ? 0 : std::min(rank, n)));
          CHECK_NEAR(distance(Matrix<double>(q * q.transpose()), Matrix<double>::Identity(k, k)),
                     0.0, tiny);
          const Matrix<double> residual = before - before * q.transpose() * q;
          CHECK_NEAR(residual.norm(), 0.0, 40.0 * tiny * (before.norm() + 1e-30));
        }
      }
    }
  }
  Matrix<T> wide = random_matrix<T>(4, 3);
  Random random(5);
  CHECK_THROWS(orthonormalize<T>(MatrixRef<T>(wide), random, Context{}), ShapeError);
}

void sizes_are_checked() {
  Matrix<double> basis(5, 4), block(3, 4), other(3, 6);
  std::vector<double> lengths(3);
  CHECK_THROWS(extend_basis<double>(basis, 3, block, 0.1, as_array(lengths), Context{}),
               ShapeError);
  CHECK_THROWS(extend_basis<double>(basis, -1, block, 0.1, as_array(lengths), Context{}),
               ShapeError);
  CHECK_THROWS(extend_basis<double>(basis, 1, other, 0.1, as_array(lengths), Context{}),
               ShapeError);
}

}  // namespace

int main() {
  extends_bases_of_all_shapes<double>();
  extends_bases_of_all_shapes<float>();
  small_remainders_are_found();
  full_basis_is_not_extended();
  blocks_become_orthonormal<double>();
  blocks_become_orthonormal<float>();
  sizes_are_checked();
  return check::result();
}
