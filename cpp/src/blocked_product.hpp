// SPDX-License-Identifier: MIT
// Blocked matrix products, used by product.cpp only.
//
// op(A) is packed into tiles of `tile_rows` rows, op(B) into tiles of `tile_vectors` vectors of
// columns. Packing also does all transposes. The kernel multiplies two tiles with all sums in
// registers: for each term k it loads a few vectors of B and one coefficient of A per row, and
// starts tile_rows * tile_vectors multiply-adds. Terms are processed in layers of `layer_depth`: a
// tile of A (16 KB) then stays in the first-level cache while it is multiplied by all tiles of a
// block of B (0.4 MB), which stays in the second-level cache.
//
// Cost for m x n x k: 2 m n k flops; m k + k n entries packed once; m n entries of C read and
// written once per layer. One thread sums each entry of C, in an order that depends on k alone, so
// results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <utility>

#include "dlnfast/product.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

namespace dlnfast::blocked {

inline constexpr int tile_rows = simd::n_registers == 32 ? 8 : 4;
inline constexpr int tile_vectors = simd::n_registers == 32 || simd::vector_bytes == 32 ? 3 : 2;
inline constexpr Index layer_depth = 256;
inline constexpr Index block_tiles = 8;  // tiles of B in a block

template <class T>
inline constexpr int tile_cols = tile_vectors * simd::Pack<T>::size;

// Packs n <= width consecutive rows of M: entry (i, k) goes to out[k * width + i]. Missing rows are
// filled with zeros.
template <class T, int width>
void pack_rows(const T* m, Index stride, Index n, Index depth, T* out) {
  constexpr int lanes = std::min(width, simd::Pack<T>::size);
  static_assert(width % lanes == 0);
  using P = simd::Pack<T, lanes* static_cast<int>(sizeof(T))>;
  for (Index first = 0; first < width; first += lanes, out += lanes, m += lanes * stride) {
    const Index rows = std::clamp<Index>(n - first, 0, lanes);
    Index k = 0;
    for (; rows == lanes && k + lanes <= depth; k += lanes) {
      typename P::Vector v[lanes];
      simd::unroll<lanes>([&](auto i) DLNFAST_INLINE { v[i] = P::load(m + i * stride + k); });
      simd::transpose<P>(v);
      simd::unroll<lanes>([&](auto i) DLNFAST_INLINE { P::store(out + (k + i) * width, v[i]); });
    }
    for (; k < depth; ++k) {
      for (Index i = 0; i < lanes; ++i) out[k * width + i] = i < rows ? m[i * stride + k] : T(0);
    }
  }
}

// Packs columns of M in the same way; rows of M are the terms.
template <class T, int width>
void pack_columns(const T* m, Index stride, Index n, Index depth, T* out) {
  for (Index k = 0; k < depth; ++k, m += stride, out += width) {
    if (n == width) {
      std::copy(m, m + width, out);
    } else {
      std::copy(m, m + n, out);
      std::fill(out + n, out + width, T(0));
    }
  }
}

// Packs rows or columns [index * width, ..) of M, terms [begin, begin + depth).
template <class T, int width>
void pack_tile(const MatrixRef<const T>& m, bool rows, Index index, Index begin, Index depth,
               T* packed) {
  const Index first = index * width;
  const Index n = std::min<Index>(width, (rows ? m.rows : m.cols) - first);
  T* out = packed + first * depth;
  if (rows) {
    pack_rows<T, width>(m.row(first) + begin, m.stride, n, depth, out);
  } else {
    pack_columns<T, width>(m.row(begin) + first, m.stride, n, depth, out);
  }
}

// C <- beta C + alpha A B for one tile of A and the first `vectors` vectors of a tile of B,
// restricted to the first `rows` rows and `cols` columns of C.
template <class T, int vectors>
void kernel(const T* a, const T* b, Index depth, T alpha, T beta, T* c, Index stride, int rows,
            int cols) {
  using P = simd::Pack<T>;
  using Vector = typename P::Vector;
  if (beta != T(0)) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < vectors; ++j) __builtin_prefetch(c + i * stride + j * P::size, 1);
    }
  }
  Vector sums[tile_rows][vectors] = {};
  for (Index k = 0; k < depth; ++k, a += tile_rows, b += tile_cols<T>) {
    Vector bk[vectors];
    simd::unroll<vectors>([&](auto j) DLNFAST_INLINE {
      bk[j] = P::load(b + j * P::size);
      simd::hold_in_register(bk[j]);
    });
    simd::unroll<tile_rows>([&](auto i) DLNFAST_INLINE {
      const Vector ak = P::broadcast(a[i]);
      simd::unroll<vectors>([&](auto j) DLNFAST_INLINE { sums[i][j] += ak * bk[j]; });
    });
  }
  simd::unroll<tile_rows>([&](auto i) DLNFAST_INLINE {
    simd::unroll<vectors>([&](auto j) DLNFAST_INLINE {
      const int n = std::min(cols - j * P::size, P::size);
      if (i >= rows || n <= 0) return;
      T* p = c + i * stride + j * P::size;
      Vector v = sums[i][j] * alpha;
      if (n == P::size) {
        if (beta != T(0)) v += P::load(p) * beta;
        P::store(p, v);
      } else {
        if (beta != T(0)) v += P::load_part(p, n) * beta;
        P::store_part(p, v, n);
      }
    });
  });
}

// Calls the kernel with the number of vectors that `cols` needs.
template <class T, int vectors = tile_vectors>
void multiply_tile(const T* a, const T* b, Index depth, T alpha, T beta, T* c, Index stride,
                   int rows, int cols) {
  if constexpr (vectors > 1) {
    if (cols <= (vectors - 1) * simd::Pack<T>::size) {
      return multiply_tile<T, vectors - 1>(a, b, depth, alpha, beta, c, stride, rows, cols);
    }
  }
  kernel<T, vectors>(a, b, depth, alpha, beta, c, stride, rows, cols);
}

inline Index ceil_div(Index n, Index width) { return (n + width - 1) / width; }

// Whether the overhead of padding is small.
template <class T>
bool suits(Index m, Index n, Index k) {
  constexpr Index lanes = simd::Pack<T>::size;
  const Index padded = ceil_div(m, tile_rows) * tile_rows * ceil_div(n, lanes) * lanes;
  return k >= 8 && 2 * padded <= 3 * m * n;
}

// C <- alpha op(A) op(B) + beta C. Sizes agree and none is zero.
template <class T>
void multiply(T alpha, const MatrixRef<const T>& a, Op op_a, const MatrixRef<const T>& b, Op op_b,
              T beta, const MatrixRef<T>& c, int team, Workspace& workspace) {
  constexpr int width = tile_cols<T>;
  constexpr Index bunch = 2;  // tiles packed per task
  const Index k = op_a == Op::none ? a.cols : a.rows;
  const Index row_tiles = ceil_div(c.rows, tile_rows);
  const Index col_tiles = ceil_div(c.cols, width);
  const Index a_bunches = ceil_div(row_tiles, bunch);
  const Index b_bunches = ceil_div(col_tiles, bunch);
  const Index col_blocks = ceil_div(col_tiles, block_tiles);
  const Index row_blocks = team == 1 ? 1 : std::min(row_tiles, ceil_div(16 * team, col_blocks));
  const Index deepest = std::min(k, layer_depth);
  T* packed_a = workspace.reserve<T>((row_tiles * tile_rows + col_tiles * width) * deepest);
  T* packed_b = packed_a + row_tiles * tile_rows * deepest;

  for (Index begin = 0; begin < k; begin += layer_depth) {
    const Index depth = std::min(layer_depth, k - begin);
    parallel_dynamic(team, a_bunches + b_bunches, [&](Index i) {
      const bool of_a = i < a_bunches;
      const Index first = (of_a ? i : i - a_bunches) * bunch;
      const Index last = std::min(first + bunch, of_a ? row_tiles : col_tiles);
      for (Index t = first; t < last; ++t) {
        if (of_a) {
          pack_tile<T, tile_rows>(a, op_a == Op::none, t, begin, depth, packed_a);
        } else {
          pack_tile<T, width>(b, op_b == Op::transpose, t, begin, depth, packed_b);
        }
      }
    });
    const T beta_here = begin == 0 ? beta : T(1);
    parallel_dynamic(team, col_blocks * row_blocks, [&](Index task) {
      const Share cols = share(col_tiles, 1, task / row_blocks, col_blocks);
      const Share rows = share(row_tiles, 1, task % row_blocks, row_blocks);
      for (Index i = rows.begin; i < rows.end; ++i) {
        const Index row = i * tile_rows;
        const int n_rows = static_cast<int>(std::min<Index>(tile_rows, c.rows - row));
        for (Index j = cols.begin; j < cols.end; ++j) {
          const Index col = j * width;
          const int n_cols = static_cast<int>(std::min<Index>(width, c.cols - col));
          multiply_tile<T>(packed_a + row * depth, packed_b + col * depth, depth, alpha, beta_here,
                           c.row(row) + col, c.stride, n_rows, n_cols);
        }
      }
    });
  }
}

}  // namespace dlnfast::blocked
