// SPDX-License-Identifier: MIT
// Residuals of a matrix that is not known as a whole: on its observed entries, or through linear
// measurements.
//
// Observed entries are kept in both orders, so that a product with the residual E = Omega * (M - Phi)
// never has two writers: E Y^T belongs to the rows, E^T X^T to the columns. For M = X^T Y with k rows
// of X and Y both passes compute the residual anew, 2 k flops an entry, rather than look it up: it
// would have to be fetched from another place in memory for each entry. With both products that is
// 8 k flops and two times 4 + sizeof(T) bytes an entry, and no memory of the size of E.
#pragma once

#include <cstdint>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Entries row after row: those of row i stand at start[i], .., start[i + 1] - 1.
template <class T>
struct SparseRows {
  Index rows = 0;
  Index cols = 0;
  Index size = 0;
  const std::int64_t* start = nullptr;  // rows + 1 numbers
  const std::int32_t* index = nullptr;  // the column of each entry
  const T* values = nullptr;
};

// The observed entries of an m x n matrix; `by_columns` holds the transpose (n rows of m entries).
template <class T>
struct ObservedEntries {
  SparseRows<T> by_rows;
  SparseRows<T> by_columns;

  Index rows() const { return by_rows.rows; }
  Index cols() const { return by_rows.cols; }
};

// Whether the starts ascend, the entries are inside the matrix, and there are alike many in both
// orders; otherwise a ShapeError or std::invalid_argument. Everything below relies on it.
template <class T>
void check_entries(const ObservedEntries<T>& entries);

// Sorts entries given as (row, column, value) into rows, columns ascending. Returns the position in
// the input of the first entry whose place is outside the matrix or was there before, -1 if there is
// none. Where there is one the output is not complete.
// O(n + rows + cols), with 8 n + 8 max(rows, cols) bytes of its own.
template <class T>
Index sort_entries(ArrayRef<const std::int64_t, 1> row, ArrayRef<const std::int64_t, 1> col,
                   ArrayRef<const T, 1> value, Index rows, Index cols,
                   ArrayRef<std::int64_t, 1> start, ArrayRef<std::int32_t, 1> index,
                   ArrayRef<T, 1> values);

// The same entries, column after column.
template <class T>
void transpose_entries(const SparseRows<T>& by_rows, ArrayRef<std::int64_t, 1> start,
                       ArrayRef<std::int32_t, 1> index, ArrayRef<T, 1> values);

// E = Omega * (X^T Y - Phi) for X (k x m), Y (k x n): returns || E ||_F^2 and writes
// left = Y E^T (k x m) and right = X E (k x n); either may be absent.
template <class T>
double residual_products(const ObservedEntries<T>& entries, MatrixRef<const T> x,
                         MatrixRef<const T> y, MatrixRef<T> left, MatrixRef<T> right,
                         const Context& context);

// E = Omega * (M - Phi) as a whole, zeros included; returns || E ||_F^2.
template <class T>
double masked_residual(const SparseRows<T>& by_rows, MatrixRef<const T> m, MatrixRef<T> error,
                       const Context& context);

// Linear measurements y = B vec(M) of an m x n matrix, vec by rows.
template <class T>
struct Measurements {
  MatrixRef<const T> operators;  // B, q x (m n)
  const T* values = nullptr;     // y, q numbers
};

// r = B vec(M) - y: returns || r ||^2 and writes E = sum_i r_i B_i, the gradient of half of that. B is
// read once: 4 q m n flops. M and E are contiguous.
template <class T>
double measured_residual(const Measurements<T>& measurements, MatrixRef<const T> m,
                         MatrixRef<T> error, const Context& context);

}  // namespace dlnfast
