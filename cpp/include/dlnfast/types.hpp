// SPDX-License-Identifier: MIT
// The matrix types of the core. Everything is row-major, every size is 64 bits wide.
//
// The bindings see views only (DLNFAST_VIEWS_ONLY): they are compiled once for all instruction-set levels,
// and what Eigen's inline functions do, such as where they put memory and how it is freed, depends on these.
#pragma once

#include <Eigen/Core>
#include <cstdint>

namespace dlnfast {

using Index = Eigen::Index;
static_assert(sizeof(Index) == 8, "sizes are 64 bits wide");

template <class T>
using Matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// A matrix that somebody else owns: row i starts at data + i * stride.
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

  // Whether this is no matrix at all; one without entries still has its sizes.
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
