// SPDX-License-Identifier: MIT
// The matrix types of the core. All matrices are row-major, all sizes are 64-bit.
//
// The bindings see views only (DLNFAST_VIEWS_ONLY). They are compiled once for all instruction-set
// levels, while the alignment and deallocation in Eigen's inline functions depend on the level.
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace dlnfast {

using Index = Eigen::Index;
static_assert(sizeof(Index) == 8, "sizes are 64 bits wide");

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// A non-owning view of a matrix: row i starts at data + i * stride.
template <class T>
struct MatrixRef {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;

  MatrixRef() = default;
  MatrixRef(T* data_, Index rows_, Index cols_) : MatrixRef(data_, rows_, cols_, cols_) {}
  MatrixRef(T* data_, Index rows_, Index cols_, Index stride_)
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
#ifndef DLNFAST_VIEWS_ONLY
  MatrixRef(Matrix<std::remove_const_t<T>>& m) : MatrixRef(m.data(), m.rows(), m.cols()) {}
#endif

  operator MatrixRef<const T>() const { return {data, rows, cols, stride}; }

  // Whether the view refers to no matrix. An empty matrix with one nonzero side is not absent.
  bool absent() const { return data == nullptr && rows == 0 && cols == 0; }
  T* row(Index i) const { return data + i * stride; }
  MatrixRef block(Index i, Index j, Index n_rows, Index n_cols) const {
    return {data + i * stride + j, n_rows, n_cols, stride};
  }
#ifndef DLNFAST_VIEWS_ONLY
  auto map() const {
    using Plain = Matrix<std::remove_const_t<T>>;
    using Target = std::conditional_t<std::is_const_v<T>, const Plain, Plain>;
    return Eigen::Map<Target, 0, Eigen::OuterStride<>>(data, rows, cols,
                                                       Eigen::OuterStride<>(stride));
  }
#endif
};

}  // namespace dlnfast
