// SPDX-License-Identifier: MIT
// G = factor^2 W W^T or W^T W in double precision, whichever is smaller: s x s for sides s <= l.
//
// s^2 l flops. W is converted in parts, so that no copy of it is needed. Entries have an error of at most
// (l + 2) epsilon |w_i| |w_j|, hence G one of at most (l + 2) epsilon ||W||_F^2.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Computes the lower triangle of G; the rest of it is undefined. Resizes `g`.
template <class T>
void lower_gram(MatrixRef<const T> w, double factor, Matrix<double>& g, const Context& context);

// Copies the lower triangle to the upper one.
void mirror_lower(Matrix<double>& g);

}  // namespace dlnfast
