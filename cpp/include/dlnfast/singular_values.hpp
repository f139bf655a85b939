// SPDX-License-Identifier: MIT
// Singular values and vectors of whole matrices.
#pragma once

#include <vector>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// The k largest singular values of W (m x n), descending, and on request their vectors as columns:
// left m x k, right n x k. A full decomposition by divide and conquer, O(m n min(m, n)); while a
// large one runs, the monitor is asked on.
template <class T>
void singular_values(MatrixRef<const T> w, MatrixRef<T> values /* 1 x k */, MatrixRef<T> left,
                     MatrixRef<T> right, const Context& context);

// The k largest singular values, descending, of the upper bidiagonal matrix with this diagonal
// (length n) and superdiagonal (length n - 1): bisection with Sturm counts, O(n) each.
std::vector<double> bidiagonal_singular_values(ArrayRef<const double, 1> diagonal,
                                               ArrayRef<const double, 1> superdiagonal, Index k);

}  // namespace dlnfast
