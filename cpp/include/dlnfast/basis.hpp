// SPDX-License-Identifier: MIT
// Orthonormal bases: of a block of vectors, and extended by a block of vectors.
#pragma once

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Subtracts from the rows of a block (k x n) their projection onto an orthonormal basis (b x n):
// block -= (block basis^T) basis, twice: the second pass removes the cancellation errors of the first.
// 8 k b n flops.
template <class T>
void project_out(MatrixRef<T> block, MatrixRef<const T> basis, const Context& context);

// Extends an orthonormal basis by the directions of `block` outside its span. Vectors are rows: `basis` has
// at least n_basis + min(k, n) rows, of which the first n_basis are filled; `block` is k x n and is
// overwritten. The longest remaining row comes first (pivoting), as long as it is longer than `tolerance`.
// Every new direction is orthogonalised against all others twice, so that the rows stay orthonormal to
// rounding. `lengths` (k numbers) receives the length of the row that each new direction was made from:
// rounding errors of the block were divided by it.
// Returns the number of rows that were added. About 4 k n (n_basis + k) flops.
template <class T>
Index extend_basis(MatrixRef<T> basis, Index n_basis, MatrixRef<T> block, double tolerance,
                   ArrayRef<double, 1> lengths, const Context& context);

// Makes the rows of a block (k x n, k <= n) orthonormal, in place, and keeps their span. Random directions
// orthogonal to all others replace rows that depend on the others. Rows are scaled to length 1 first, so
// that short ones count as much as long ones. If they are then far from dependent, this takes about 6 k^2 n
// flops (Cholesky; twice, unless they were nearly orthogonal); otherwise those of `extend_basis`.
// Returns the rank of the block.
template <class T>
Index orthonormalize(MatrixRef<T> block, Random& random, const Context& context);

}  // namespace dlnfast
