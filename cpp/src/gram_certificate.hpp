// SPDX-License-Identifier: MIT
// Rigorous bound on the norm of the complement of tracked pairs, from a Gram matrix and a Cholesky
// factorisation. With G = W^T W and the right vectors X (rows) of j pairs, or W W^T and the left ones,
//
//   tau^2 - G + X^T D X  positive definite   =>   |W v| < tau |v|  for all v orthogonal to X,             (1)
//
// so that the complement is smaller than tau. The diagonal D > 0 only makes room for the pairs. Rounding adds
// at most
//
//   epsilon ((l + 8) ||W||_F^2 + (s + 2 j + 16) trace)                                                   (2)
//
// to tau^2, for sides s <= l and the trace of the matrix in (1). s^2 l + s^3 / 3 flops in double precision and
// 8 s^2 bytes: unlike a Krylov space, it gives a sharp bound at the edge of a bulk of values.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"
#include "subspace_iteration.hpp"

namespace dlnfast {

// Returns a bound on the complement of the first j pairs, slightly above tau; infinity if tau is too small.
// The pairs are those of factor * W.
template <class T>
double bound_complement(MatrixRef<const T> w, double factor, const SingularPairs<T>& pairs, Index j,
                        double tau, const Context& context);

}  // namespace dlnfast
