// SPDX-License-Identifier: MIT
// Square matrices of a size known at compile time, padded with zeros, and their products in the
// registers and the first-level cache. The operation after a product, such as the update of a
// weight, reads the sums directly from the registers.
#pragma once

#include <algorithm>

#include "dlnfast/simd.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

constexpr int vector_bytes_for(int needed) {
  int bytes = 16;
  while (bytes < needed && bytes < simd::vector_bytes) bytes *= 2;
  return bytes;
}

// Products of matrices of up to Size rows and columns.
template <class T, int Size>
class FixedProducts {
 public:
  using P = simd::Pack<T, vector_bytes_for(Size* static_cast<int>(sizeof(T)))>;
  using Vector = typename P::Vector;
  static constexpr int n_vectors = (Size + P::size - 1) / P::size;
  static constexpr int stride = n_vectors * P::size;

  // For sizes below this, the number of units is the constant `Size`, padding included. From this
  // size on it is a runtime value: the padded units are skipped, except for one if the number is
  // odd.
  static constexpr int runtime_size = 16;
  static_assert(Size % 2 == 0);

  // A tile of a product: as many sums as the registers hold together with the operands, in a
  // divisor of the columns.
  static constexpr int sums_limit = simd::n_registers == 32 ? 24 : 10;
  static constexpr int tile_vectors() {
    int best = 1;
    for (int n = 1; n <= std::min(n_vectors, 5); ++n) {
      if (n_vectors % n == 0) best = n;
    }
    return best;
  }
  static constexpr int tile_rows() {
    const int limit = sums_limit / tile_vectors();
    if (Size >= runtime_size) return std::min(limit / 2 * 2, 8);
    int best = 1;
    for (int rows = 1; rows <= std::min(Size, limit); ++rows) {
      if (Size % rows == 0) best = rows;
    }
    return best;
  }

  struct alignas(64) Block {
    T a[stride * stride] = {};
  };

  // The matrices have at most `size` rows and columns.
  explicit FixedProducts(Index size) : size_(static_cast<int>(size + size % 2)) {}

  template <class U>
  static void load(const MatrixRef<U>& m, Block& block) {
    block = Block();
    for (Index i = 0; i < m.rows; ++i) std::copy(m.row(i), m.row(i) + m.cols, block.a + i * stride);
  }

  static void store(const Block& block, const MatrixRef<T>& m) {
    for (Index i = 0; i < m.rows; ++i) {
      const T* from = block.a + i * stride;
      std::copy(from, from + m.cols, m.row(i));
    }
  }

  static auto into(Block& c) {
    return [&c](int at, const Vector& v) DLNFAST_INLINE { P::store(c.a + at, v); };
  }

  // Computes A B: calls store(at, v) for every vector of the result.
  template <class Store>
  DLNFAST_INLINE void multiply(const Block& a, const Block& b, const Store& store) const {
    multiply_tiles<false>(a, b, store);
  }

  // The same for A^T B.
  template <class Store>
  DLNFAST_INLINE void multiply_transpose(const Block& a, const Block& b, const Store& store) const {
    multiply_tiles<true>(a, b, store);
  }

  void transpose(const Block& a, Block& b) const {
    for (int i = 0; i < size(); i += P::size) {
      for (int j = 0; j < size(); j += P::size) {
        Vector v[P::size];
        DLNFAST_UNROLL
        for (int r = 0; r < P::size; ++r) v[r] = P::load(a.a + (i + r) * stride + j);
        simd::transpose<P>(v);
        DLNFAST_UNROLL
        for (int r = 0; r < P::size; ++r) P::store(b.a + (j + r) * stride + i, v[r]);
      }
    }
  }

 private:
  int size() const {
    if constexpr (Size < runtime_size) return Size;
    return size_;
  }

  template <bool transpose_a, class Store>
  DLNFAST_INLINE void multiply_tiles(const Block& a, const Block& b, const Store& store) const {
    constexpr int rows = tile_rows();
    const int n = size();
    int i = 0;
    for (; i + rows <= n; i += rows) multiply_rows<rows, transpose_a>(a, b, n, i, store);
    if constexpr (Size >= runtime_size)
      multiply_last_rows<rows - 2, transpose_a>(a, b, n, i, store);
  }

  // Multiplies the last rows, an even number.
  template <int rows, bool transpose_a, class Store>
  DLNFAST_INLINE static void multiply_last_rows(const Block& a, const Block& b, int n, int i,
                                                const Store& store) {
    if constexpr (rows > 0) {
      if (n - i == rows) return multiply_rows<rows, transpose_a>(a, b, n, i, store);
      multiply_last_rows<rows - 2, transpose_a>(a, b, n, i, store);
    }
  }

  template <int rows, bool transpose_a, class Store>
  DLNFAST_INLINE static void multiply_rows(const Block& a, const Block& b, int n, int i,
                                           const Store& store) {
    constexpr int vectors = tile_vectors();
    for (int first = 0; first < n_vectors; first += vectors) {
      const T* bk = b.a + first * P::size;
      Vector sums[rows][vectors] = {};
      for (int k = 0; k < n; ++k, bk += stride) {
        Vector bv[vectors];
        DLNFAST_UNROLL
        for (int v = 0; v < vectors; ++v) {
          bv[v] = P::load(bk + v * P::size);
          if constexpr (vectors > 1) simd::hold_in_register(bv[v]);
        }
        DLNFAST_UNROLL
        for (int r = 0; r < rows; ++r) {
          const T coefficient = transpose_a ? a.a[k * stride + i + r] : a.a[(i + r) * stride + k];
          DLNFAST_UNROLL
          for (int v = 0; v < vectors; ++v) sums[r][v] += bv[v] * coefficient;
        }
      }
      DLNFAST_UNROLL
      for (int r = 0; r < rows; ++r) {
        DLNFAST_UNROLL
        for (int v = 0; v < vectors; ++v) {
          store((i + r) * stride + (first + v) * P::size, sums[r][v]);
        }
      }
    }
  }

  int size_;
};

}  // namespace dlnfast
