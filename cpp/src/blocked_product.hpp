// SPDX-License-Identifier: MIT
// Blocked matrix products, used by product.cpp only.
//
// op(A) is packed into tiles of `tile_rows` rows, op(B) into tiles of `tile_vectors` vectors of
// columns. Packing also does all transposes. The kernel multiplies two tiles with all sums in
// registers: for each term k it loads a few vectors of B and one coefficient of A per row, and
// starts tile_rows * tile_vectors multiply-adds. With 16 registers of 32 bytes, a tile of 4 rows and
// 3 vectors takes 12 sums, 3 vectors and 1 coefficient: 7 loads for 12 multiply-adds, below the one
// load per multiply-add that processors with AVX2 sustain.
//
// Terms are processed in layers of at most `layer_depth`. One tile is held in the first-level cache
// (32 KB) while it is multiplied by all tiles of a block of the other operand, which are read from
// the second-level cache:
//
//   registers      tile held       tiles read        read per multiply-add of a vector
//   16 of 32 B     B, 24 KB        A,  8 KB          32 B / 12 = 2.7 B
//   16 of 16 B     B,  8 KB        A,  8 KB          32 B /  8 = 4 B
//   32 of 64 B     A, 16 KB        B, 48 KB         192 B / 24 = 8 B
//
// With 32 registers, a tile of B and the tiles of A read meanwhile fit the first-level cache only
// for layers half as deep, which double the traffic of C; this is slower.
//
// Cost for m x n x k: 2 m n k flops; m k + k n entries packed once; m n entries of C read and
// written once per layer. One thread sums each entry of C, in an order that depends on k alone, so
// results depend neither on the number of threads nor on the sizes of the caches.
#pragma once

#include <algorithm>
#include <utility>

#include "cache_size.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"

namespace dlnfast::blocked {

inline constexpr int tile_rows = simd::n_registers == 32 ? 8 : 4;
inline constexpr int tile_vectors = simd::n_registers == 32 || simd::vector_bytes == 32 ? 3 : 2;
// Whether tiles of B are held in the first-level cache, and blocks of A read; otherwise vice versa.
inline constexpr bool holds_b = simd::n_registers == 16;
inline constexpr Index layer_depth = 256;
// Flops between two polls for interrupts: about a tenth of a second on two cores of this
// instruction set. Constant, not measured, so that a product is always split in the same way.
inline constexpr double flops_per_poll =
    simd::vector_bytes == 64 ? 1.8e10 : (simd::vector_bytes == 32 ? 1e10 : 4e9);
// Rows or columns that are packed by one task: 512 bytes, or eight cache lines, of a row of M.
template <class T>
inline constexpr Index packed_per_task = 512 / static_cast<Index>(sizeof(T));

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

// Packs n columns of M in the same way, tile after tile; rows of M are the terms. Each row is read
// once, for all tiles.
template <class T, int width>
void pack_columns(const T* m, Index stride, Index n, Index depth, T* out) {
  constexpr int lanes = std::min(width, simd::Pack<T>::size);
  using P = simd::Pack<T, lanes* static_cast<int>(sizeof(T))>;
  const Index n_whole = n / width;
  const Index remainder = n % width;
  for (Index k = 0; k < depth; ++k, m += stride, out += width) {
    const T* from = m;
    T* to = out;
    for (Index t = 0; t < n_whole; ++t, from += width, to += width * depth) {
      simd::unroll<width / lanes>(
          [&](auto v) DLNFAST_INLINE { P::store(to + v * lanes, P::load(from + v * lanes)); });
    }
    if (remainder > 0) {
      std::copy(from, from + remainder, to);
      std::fill(to + remainder, to + width, T(0));
    }
  }
}

// Packs tiles of rows or columns of M, terms [first, first + depth).
template <class T, int width>
void pack_tiles(const MatrixRef<const T>& m, bool rows, Share tiles, Index first, Index depth,
                T* packed) {
  const Index begin = tiles.begin * width;
  const Index end = std::min(tiles.end * width, rows ? m.rows : m.cols);
  if (rows) {
    for (Index i = begin; i < end; i += width) {
      pack_rows<T, width>(m.row(i) + first, m.stride, std::min<Index>(width, end - i), depth,
                          packed + i * depth);
    }
  } else {
    pack_columns<T, width>(m.row(first) + begin, m.stride, end - begin, depth,
                           packed + begin * depth);
  }
}

// C <- beta C + alpha A B for one tile of A and the first `vectors` vectors of a tile of B,
// restricted to the first `rows` rows and `cols` columns of C.
template <class T, int vectors>
void kernel(const T* a, const T* b, Index depth, T alpha, T beta, T* c, Index stride, int rows,
            int cols) {
  using P = simd::Pack<T>;
  using Vector = typename P::Vector;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < vectors; ++j) __builtin_prefetch(c + i * stride + j * P::size, 1);
  }
  Vector sums[tile_rows][vectors] = {};
  // Not unrolled further: that was slower.
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
  const auto update = [&](T* p, const Vector& sum) DLNFAST_INLINE {
    P::store(p, beta != T(0) ? sum * alpha + P::load(p) * beta : sum * alpha);
  };
  if (rows == tile_rows && cols >= vectors * P::size) {
    simd::unroll<tile_rows>([&](auto i) DLNFAST_INLINE {
      simd::unroll<vectors>(
          [&](auto j) DLNFAST_INLINE { update(c + i * stride + j * P::size, sums[i][j]); });
    });
    return;
  }
  simd::unroll<tile_rows>([&](auto i) DLNFAST_INLINE {
    simd::unroll<vectors>([&](auto j) DLNFAST_INLINE {
      const int n = std::min(cols - j * P::size, P::size);
      if (i >= rows || n <= 0) return;
      T* p = c + i * stride + j * P::size;
      if (n == P::size) {
        update(p, sums[i][j]);
      } else {
        Vector v = sums[i][j] * alpha;
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

inline double count_flops(Index m, Index n, Index k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

// Whether the overhead of padding is small.
template <class T>
bool suits(Index m, Index n, Index k) {
  constexpr Index lanes = simd::Pack<T>::size;
  const Index padded = ceil_div(m, tile_rows) * tile_rows * ceil_div(n, lanes) * lanes;
  return k >= 8 && 2 * padded <= 3 * m * n;
}

// Terms of the deepest layer, for layers of nearly equal depth.
inline Index deepest_layer(Index k) {
  constexpr Index pack_unit = 8;
  return ceil_div(ceil_div(k, ceil_div(k, layer_depth)), pack_unit) * pack_unit;
}

// Entries of the packed operands of a layer, for a result of m x n with k terms.
template <class T>
Index packed_size(Index m, Index n, Index k) {
  const Index rows = ceil_div(m, tile_rows) * tile_rows;
  const Index cols = ceil_div(n, tile_cols<T>) * tile_cols<T>;
  return (rows + cols) * deepest_layer(k);
}

// C <- alpha op(A) op(B) + beta C, with room for packed_size entries in `packed_a`. Sizes agree and
// none is zero. Polls between layers.
template <class T>
void multiply(T alpha, const MatrixRef<const T>& a, Op op_a, const MatrixRef<const T>& b, Op op_b,
              T beta, const MatrixRef<T>& c, int team, T* packed_a, const Context& context) {
  constexpr int width = tile_cols<T>;
  const Index k = op_a == Op::none ? a.cols : a.rows;
  const Index row_tiles = ceil_div(c.rows, tile_rows);
  const Index col_tiles = ceil_div(c.cols, width);
  const Index deepest = deepest_layer(k);
  T* packed_b = packed_a + row_tiles * tile_rows * deepest;

  // Blocks of the operand that is read take 3/8 of the second-level cache.
  const Index read_tiles = holds_b ? row_tiles : col_tiles;
  const Index held_tiles = holds_b ? col_tiles : row_tiles;
  const Index tile_bytes = (holds_b ? tile_rows : width) * deepest * Index(sizeof(T));
  const Index block_tiles = std::max<Index>(1, second_level_cache() * 3 / 8 / tile_bytes);
  const Index n_blocks = ceil_div(read_tiles, block_tiles);
  const Index n_groups = team == 1 ? 1 : std::min(held_tiles, ceil_div(16 * team, n_blocks));
  const Index pack_tasks =
      ceil_div(std::max(row_tiles * tile_rows, col_tiles * width), packed_per_task<T>);

  double unpolled_flops = 0.0;
  for (Index begin = 0; begin < k; begin += deepest) {
    const Index depth = std::min(deepest, k - begin);
    const double flops = count_flops(c.rows, c.cols, depth);
    if (unpolled_flops + flops > flops_per_poll) {
      context.poll();
      unpolled_flops = 0.0;
    }
    unpolled_flops += flops;
    // Every task packs a part of both operands, so that each thread finds half of what it multiplies
    // in its own cache.
    parallel_dynamic(team, pack_tasks, [&](Index task) {
      pack_tiles<T, tile_rows>(a, op_a == Op::none, share(row_tiles, 1, task, pack_tasks), begin,
                               depth, packed_a);
      pack_tiles<T, width>(b, op_b == Op::transpose, share(col_tiles, 1, task, pack_tasks), begin,
                           depth, packed_b);
    });
    const T beta_here = begin == 0 ? beta : T(1);
    parallel_dynamic(team, n_blocks * n_groups, [&](Index task) {
      const Share block = share(read_tiles, 1, task / n_groups, n_blocks);
      const Share group = share(held_tiles, 1, task % n_groups, n_groups);
      for (Index held = group.begin; held < group.end; ++held) {
        for (Index read = block.begin; read < block.end; ++read) {
          const Index row = (holds_b ? read : held) * tile_rows;
          const Index col = (holds_b ? held : read) * width;
          const int n_rows = static_cast<int>(std::min<Index>(tile_rows, c.rows - row));
          const int n_cols = static_cast<int>(std::min<Index>(width, c.cols - col));
          multiply_tile<T>(packed_a + row * depth, packed_b + col * depth, depth, alpha, beta_here,
                           c.row(row) + col, c.stride, n_rows, n_cols);
        }
      }
    });
  }
}

}  // namespace dlnfast::blocked
