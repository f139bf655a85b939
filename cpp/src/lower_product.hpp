// SPDX-License-Identifier: MIT
// The lower triangle of a symmetric product of matrices: half the flops of the whole.
#pragma once

#include "dlnfast/product.hpp"

namespace dlnfast {

// Size of the first of two halves of n rows or columns: a multiple of the largest size that is not split.
inline constexpr Index unsplit_size = 64;
inline Index first_half(Index n) {
  return (n / 2 + unsplit_size - 1) / unsplit_size * unsplit_size;
}

// The lower triangle of C = beta C + alpha A B^T for Op::none, beta C + alpha A^T B for Op::transpose, where the
// product is symmetric and C is s x s. Entries above the diagonal are undefined afterwards. Splits C into halves,
// so that most of the work is in large products.
void multiply_lower(double alpha, MatrixRef<const double> a, MatrixRef<const double> b, Op op,
                    double beta, MatrixRef<double> c, const Context& context);

}  // namespace dlnfast
