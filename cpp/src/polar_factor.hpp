// SPDX-License-Identifier: MIT
// Functions of the singular values of X = U diag(s) V^T and of the eigenvalues of symmetric matrices,
// for update rules.
#pragma once

#include <memory>
#include <vector>

#include "dlnfast/descent.hpp"
#include "dlnfast/workspace.hpp"

namespace dlnfast {

// Newton-Schulz iteration, X <- a X + b X X^T X + c X (X^T X)^2: an odd polynomial in the singular
// values. 3 products of 2 m^2 n or 2 m^3 flops each for the smaller side m.
template <class T>
class NewtonSchulz {
 public:
  virtual ~NewtonSchulz() = default;
  // Iterates in place.
  virtual void iterate(const MatrixRef<T>& x, const Optimizer& optimizer,
                       const Context& context) = 0;
};

// For matrices with `rows` and `cols`: up to `small_limit` in the first-level cache.
template <class T>
std::unique_ptr<NewtonSchulz<T>> newton_schulz(Index rows, Index cols);

// The same polynomial of one singular value.
double newton_schulz(double x, const Optimizer& optimizer);

// Exact polar factors: X <- U diag(s > rank_tolerance s_1) V^T, where s_1 is the larger of the largest
// singular value of X and of `other`. Returns that s_1. In double precision.
template <class T>
double polar_factor(const MatrixRef<T>& x, double other, double rank_tolerance,
                    const Context& context);

// P^(-1/4) for a symmetric positive definite P.
Matrix<double> inverse_fourth_root(const MatrixRef<double>& p, const Context& context);

extern template std::unique_ptr<NewtonSchulz<float>> newton_schulz<float>(Index, Index);
extern template std::unique_ptr<NewtonSchulz<double>> newton_schulz<double>(Index, Index);
extern template double polar_factor(const MatrixRef<float>&, double, double, const Context&);
extern template double polar_factor(const MatrixRef<double>&, double, double, const Context&);

}  // namespace dlnfast
