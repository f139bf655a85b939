// SPDX-License-Identifier: MIT
// Gaussian posteriors of one factor of a partly known matrix, given those of the other factor.
//
// The model of an entry is
//
//   value_ij = f_i . g_j + a_i + b_j + noise of variance 1 / (precision_i weight_j weight_ij),
//
// with priors N(mean_i, Lambda^-1) of u_i = (f_i, a_i) and independent posteriors of all rows and
// columns. The posterior of u_i is then Gaussian with the precision matrix Lambda + precision_i
// sum_j weight_j weight_ij E[h_j h_j^T], h_j = (g_j, 1): a ridge regression whose Gram matrix also has the
// covariances of the other factor. Without covariances it is one half-step of alternating least squares.
//
// Lim, Teh, "Variational Bayesian approach to movie rating prediction" (2007); Raiko, Ilin, Karhunen,
// "Principal component analysis for large scale problems with lots of missing values" (2007).
#pragma once

#include <optional>

#include "dlnfast/completion.hpp"

namespace dlnfast {

// A row or column is stored as the second moments of (f, 1, a), k + 2 entries: the lower triangle, packed row
// by row. So E[f f^T] comes first, then E[f] and 1, then E[a f^T], E[a] and E[a^2].
inline Index count_moments(Index k) { return (k + 2) * (k + 3) / 2; }
// The length of a row of moments in memory: whole vectors of all instruction sets.
inline Index padded_moments(Index k) { return (count_moments(k) + 15) / 16 * 16; }

// The precision matrix Lambda of a prior, k + 1 by k + 1, and Lambda mean_i for every row i.
template <class T>
struct RowPrior {
  MatrixRef<const T> precision;
  MatrixRef<const T> shifts;
};

// Writes the moments of all rows, and for each the expected sum of squared errors of its entries, every one
// times its own weight and that of its column. `others` has the moments of the columns, `weights` their
// weights, and `entry_weights` those of the entries; without these all are 1. With `uncertain` = false
// covariances are left out of the moments.
//
// Per entry: 2 count_moments(k) flops, and as many numbers read. Per row: about (k + 1)^3 flops.
template <class T>
void row_posteriors(const SparseRows<T>& entries, MatrixRef<const T> others,
                    ArrayRef<const T, 1> weights,
                    const std::optional<ArrayRef<const T, 1>>& entry_weights,
                    ArrayRef<const T, 1> precisions, const RowPrior<T>& prior, bool uncertain,
                    MatrixRef<T> moments, ArrayRef<double, 1> errors, const Context& context);

}  // namespace dlnfast
