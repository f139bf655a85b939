// SPDX-License-Identifier: MIT
// Matrix products: C = beta C + alpha op(A) op(B), multi-threaded.
#pragma once

#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

enum class Op { none, transpose };

// C = beta C + alpha op(A) op(B). 2 m n k flops. Threads own blocks of the output, so no locks are
// needed. A long product polls for interrupts several times a second.
template <class T>
void multiply(T alpha, MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b, T beta,
              MatrixRef<T> c, const Context& context);

// C = op(A) op(B).
template <class T>
void multiply(MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b, MatrixRef<T> c,
              const Context& context) {
  multiply<T>(T(1), a, op_a, b, op_b, T(0), c, context);
}

}  // namespace dlnfast
