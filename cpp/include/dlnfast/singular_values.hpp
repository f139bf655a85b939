// SPDX-License-Identifier: MIT
// Singular values and vectors of dense matrices.
#pragma once

#include <vector>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Computes the k largest singular values of W (m x n), descending, and optionally their vectors as
// columns: left m x k, right n x k. Full decomposition by divide and conquer, O(m n min(m, n)).
// Polls the monitor while a large decomposition runs.
template <class T>
void singular_values(MatrixRef<const T> w, MatrixRef<T> values /* 1 x k */, MatrixRef<T> left,
                     MatrixRef<T> right, const Context& context);

// Computes the k largest singular values, descending, of the upper bidiagonal matrix with this
// diagonal (length n) and superdiagonal (length n - 1). Bisection with Sturm counts, O(n) each.
std::vector<double> bidiagonal_singular_values(ArrayRef<const double, 1> diagonal,
                                               ArrayRef<const double, 1> superdiagonal, Index k);

}  // namespace dlnfast
