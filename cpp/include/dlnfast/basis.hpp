// SPDX-License-Identifier: MIT
// Orthonormal bases: of a block, and bases that grow by what a block adds to their span.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Leaves of the rows of a block (k x n) what is orthogonal to an orthonormal basis (b x n):
// block -= (block basis^T) basis, twice, as the second pass removes what cancellation left in the first.
// 8 k b n flops.
template <class T>
void project_out(MatrixRef<T> block, MatrixRef<const T> basis, const Context& context);

// Appends to an orthonormal basis what `block` has outside its span. Vectors are rows: `basis` has
// room for at least n_basis + min(k, n) of them, the first n_basis are filled; `block` is k x n and is
// destroyed. Directions are taken by size (pivoting) as long as what is left of some row is longer
// than `tolerance`; every new one is orthogonalised against all others twice, so that the rows stay
// orthonormal to rounding. `lengths` (k numbers) receives how long the remainder was that each new
// direction was made from: rounding errors of the block were divided by it.
// Returns how many rows were added. About 4 k n (n_basis + k) flops.
template <class T>
Index extend_basis(MatrixRef<T> basis, Index n_basis, MatrixRef<T> block, double tolerance,
                   double* lengths, const Context& context);

// Makes the rows of a block (k x n, k <= n) orthonormal, in place; their span is kept. Rows that add
// nothing to the span of the others become random directions orthogonal to all. Rows are scaled to
// length 1 first, so that small ones count as much as long ones. About 6 k^2 n flops where they are
// then far from dependent (Cholesky; again, unless they were nearly orthogonal), otherwise those of
// `extend_basis`.
// Returns the rank that was found.
template <class T>
Index orthonormalize(MatrixRef<T> block, Random& random, const Context& context);

}  // namespace dlnfast
