// SPDX-License-Identifier: MIT
#include "dlnfast/product.hpp"

#include <cmath>

#include "blocked_product.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

namespace dlnfast {
namespace {

// Flops below which a second thread costs more than it saves (about 40 us of one core).
constexpr double flops_per_thread = 2e6;
// Largest team, and most flops, of a product of which each thread packs its own operands. A packed
// entry that another core reads costs several times as much as packing it again; with more threads
// or larger matrices, packing once is faster.
constexpr int largest_packing_team = 4;
constexpr double packing_team_flops = 3e8;
using blocked::count_flops;
using blocked::flops_per_poll;
constexpr Index narrow_chunk = 128;  // rows or columns of a narrow product

template <class T>
MatrixRef<const T> part(MatrixRef<const T> m, Op op, bool of_rows, Index begin, Index n) {
  // Rows of op(M) are columns of M if it is transposed, and vice versa.
  if (of_rows == (op == Op::none)) return m.block(begin, 0, n, m.cols);
  return m.block(0, begin, m.rows, n);
}

template <class T>
void multiply_on_one_thread(T alpha, MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b,
                            T beta, MatrixRef<T> c) {
  auto out = c.map();
  if (beta == T(0)) {
    out.setZero();
  } else if (beta != T(1)) {
    out *= beta;
  }
  const auto lhs = a.map();
  const auto rhs = b.map();
  if (op_a == Op::none && op_b == Op::none) {
    out.noalias() += alpha * lhs * rhs;
  } else if (op_a == Op::transpose && op_b == Op::none) {
    out.noalias() += alpha * lhs.transpose() * rhs;
  } else if (op_a == Op::none) {
    out.noalias() += alpha * lhs * rhs.transpose();
  } else {
    out.noalias() += alpha * lhs.transpose() * rhs.transpose();
  }
}

template <class T>
void multiply_packed(T alpha, MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b, T beta,
                     MatrixRef<T> c, Index k, const Context& context) {
  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  const double flops = count_flops(c.rows, c.cols, k);
  const int team = team_size(context.n_threads, flops, flops_per_thread);
  if (team == 1 || team > largest_packing_team || flops > packing_team_flops) {
    T* packed = workspace.reserve<T>(blocked::packed_size<T>(c.rows, c.cols, k));
    blocked::multiply<T>(alpha, a, op_a, b, op_b, beta, c, team, packed, context);
    return;
  }
  // Each thread multiplies a part of the rows or columns of C by itself. Such a product has too few
  // flops to poll.
  const bool by_rows = c.rows >= c.cols;
  const Index n = by_rows ? c.rows : c.cols;
  const Index grain = by_rows ? blocked::tile_rows : blocked::tile_cols<T>;
  const Index longest = share(n, grain, 0, team).end + grain;
  const Index size = by_rows ? blocked::packed_size<T>(longest, c.cols, k)
                             : blocked::packed_size<T>(c.rows, longest, k);
  T* packed = workspace.reserve<T>(team * size);
  parallel_dynamic(team, team, [&](Index member) {
    const Share range = share(n, grain, member, team);
    const Index count = range.end - range.begin;
    if (count == 0) return;
    T* room = packed + member * size;
    if (by_rows) {
      blocked::multiply<T>(alpha, part(a, op_a, true, range.begin, count), op_a, b, op_b, beta,
                           c.block(range.begin, 0, count, c.cols), 1, room, context);
    } else {
      blocked::multiply<T>(alpha, a, op_a, part(b, op_b, false, range.begin, count), op_b, beta,
                           c.block(0, range.begin, c.rows, count), 1, room, context);
    }
  });
}

template <class T>
void multiply_block(T alpha, MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b, T beta,
                    MatrixRef<T> c, Index k, const Context& context) {
  const double flops = count_flops(c.rows, c.cols, k);
  if (blocked::suits<T>(c.rows, c.cols, k)) {
    multiply_packed(alpha, a, op_a, b, op_b, beta, c, k, context);
    return;
  }
  // The chunks, and hence the results, do not depend on the number of threads.
  const bool by_rows = c.rows >= c.cols;
  const Index n = by_rows ? c.rows : c.cols;
  const Index n_chunks = (n + narrow_chunk - 1) / narrow_chunk;
  int team = team_size(context.n_threads, flops, flops_per_thread);
  team = static_cast<int>(std::min<Index>(team, n_chunks));
  parallel_dynamic(team, n_chunks, [&](Index chunk) {
    const Index begin = chunk * narrow_chunk;
    const Index count = std::min(narrow_chunk, n - begin);
    if (by_rows) {
      multiply_on_one_thread<T>(alpha, part(a, op_a, true, begin, count), op_a, b, op_b, beta,
                                c.block(begin, 0, count, c.cols));
    } else {
      multiply_on_one_thread<T>(alpha, a, op_a, part(b, op_b, false, begin, count), op_b, beta,
                                c.block(0, begin, c.rows, count));
    }
  });
}

}  // namespace

template <class T>
void multiply(T alpha, MatrixRef<const T> a, Op op_a, MatrixRef<const T> b, Op op_b, T beta,
              MatrixRef<T> c, const Context& context) {
  const Index m = op_a == Op::none ? a.rows : a.cols;
  const Index k = op_a == Op::none ? a.cols : a.rows;
  const Index n = op_b == Op::none ? b.cols : b.rows;
  require_length(op_b == Op::none ? b.rows : b.cols, k, "the inner size of a product");
  require_shape(c, m, n, "the result of a product");
  if (m == 0 || n == 0) return;

  // Pieces of the output with few flops between two polls. Blocked products poll after every layer
  // of terms as well: one piece packs each operand once.
  const Index depth = blocked::suits<T>(m, n, k) ? std::min(k, blocked::layer_depth) : k;
  const double pieces = std::ceil(std::sqrt(count_flops(m, n, depth) / flops_per_poll));
  const Index n_pieces = std::max<Index>(1, static_cast<Index>(pieces));
  const Index row_step = (m + n_pieces - 1) / n_pieces;
  const Index col_step = (n + n_pieces - 1) / n_pieces;
  for (Index i = 0; i < m; i += row_step) {
    const Index rows = std::min(row_step, m - i);
    for (Index j = 0; j < n; j += col_step) {
      const Index cols = std::min(col_step, n - j);
      context.poll();
      multiply_block<T>(alpha, part(a, op_a, true, i, rows), op_a, part(b, op_b, false, j, cols),
                        op_b, beta, c.block(i, j, rows, cols), k, context);
    }
  }
}

template void multiply<float>(float, MatrixRef<const float>, Op, MatrixRef<const float>, Op, float,
                              MatrixRef<float>, const Context&);
template void multiply<double>(double, MatrixRef<const double>, Op, MatrixRef<const double>, Op,
                               double, MatrixRef<double>, const Context&);

}  // namespace dlnfast
