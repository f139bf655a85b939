// SPDX-License-Identifier: MIT
#include "lower_product.hpp"

namespace dlnfast {
namespace {

MatrixRef<const double> part(MatrixRef<const double> a, Op op, Index begin, Index size) {
  return op == Op::none ? a.block(begin, 0, size, a.cols) : a.block(0, begin, a.rows, size);
}

}  // namespace

void multiply_lower(double alpha, MatrixRef<const double> a, MatrixRef<const double> b, Op op,
                    double beta, MatrixRef<double> c, const Context& context) {
  const Op other = op == Op::none ? Op::transpose : Op::none;
  const Index n = c.rows;
  if (n <= unsplit_size) {  // both triangles
    multiply<double>(alpha, a, op, b, other, beta, c, context);
    return;
  }
  const Index first = first_half(n), second = n - first;
  const auto a1 = part(a, op, 0, first), a2 = part(a, op, first, second);
  const auto b1 = part(b, op, 0, first), b2 = part(b, op, first, second);
  multiply_lower(alpha, a1, b1, op, beta, c.block(0, 0, first, first), context);
  multiply<double>(alpha, a2, op, b1, other, beta, c.block(first, 0, second, first), context);
  multiply_lower(alpha, a2, b2, op, beta, c.block(first, first, second, second), context);
}

}  // namespace dlnfast
