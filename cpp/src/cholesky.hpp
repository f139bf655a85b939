// SPDX-License-Identifier: MIT
// Whether a symmetric matrix is positive definite, by a Cholesky factorisation in double precision.
//
//   A = L L^T, s^3 / 3 flops, by halves:  L_11 L_11^T = A_11,  L_21 = A_21 L_11^-T,
//                                         L_22 L_22^T = A_22 - L_21 L_21^T
//
// If all pivots are positive in floating-point arithmetic, then A + E is positive semidefinite for some E with
// |E| <= (s + 2) epsilon tr(A) (Demmel; Rump, BIT 46, 2006).
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Reads and overwrites the lower triangle of `a`.
bool is_positive_definite(MatrixRef<double> a, const Context& context);

}  // namespace dlnfast
