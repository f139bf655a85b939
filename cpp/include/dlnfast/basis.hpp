// SPDX-License-Identifier: MIT
// Orthonormal bases: orthonormalise a block of vectors, or extend a basis by one.
#pragma once

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Subtracts from the rows of a block (k x n) their projection onto an orthonormal basis (b x n):
// block -= (block basis^T) basis. Runs twice, because the second pass removes the cancellation
// errors of the first. 8 k b n flops.
template <class T>
void project_out(MatrixRef<T> block, MatrixRef<const T> basis, const Context& context);

// Extends an orthonormal basis by the directions of `block` outside its span. Vectors are rows:
// `basis` has at least n_basis + min(k, n) rows, of which the first n_basis are filled. `block` is
// k x n and is overwritten. Adds the longest remaining row first (pivoting), as long as it is
// longer than `tolerance`. Orthogonalises every new row against all others twice, so that the rows
// stay orthonormal to rounding. Writes to `lengths` (k numbers) the length of each new row before
// normalisation: the division by it amplifies the rounding errors of the block. Returns the number
// of added rows. About 4 k n (n_basis + k) flops.
template <class T>
Index extend_basis(MatrixRef<T> basis, Index n_basis, MatrixRef<T> block, double tolerance,
                   ArrayRef<double, 1> lengths, const Context& context);

// Orthonormalises the rows of a block (k x n, k <= n) in place and preserves their span. Replaces
// linearly dependent rows by random directions orthogonal to all others. Scales all rows to length
// 1 first, so that the numerical rank does not depend on their lengths. If the rows are clearly
// independent, uses Cholesky factors of their Gram matrix: 8 k^2 n flops, or 4 k^2 n for nearly
// orthogonal rows. Otherwise uses `extend_basis`.
//
// Returns the rank of the block.
template <class T>
Index orthonormalize(MatrixRef<T> block, Random& random, const Context& context);

}  // namespace dlnfast
