// SPDX-License-Identifier: MIT
// Residuals of a partially known matrix: on its observed entries, or through linear measurements.
//
// Observed entries are stored by rows and by columns. A product with the residual E = Omega * (M -
// Phi) then needs no lock: threads own rows of E Y^T, and columns of E^T X^T. For M = X^T Y with k
// rows of X and Y, both passes recompute the residual (2 k flops per entry), because loading it
// would be a random memory access per entry. Together both products cost 8 k flops and two times 4
// + sizeof(T) bytes per entry, and no memory of the size of E.
#pragma once

#include <cstdint>

#include "dlnfast/array.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// A sparse matrix in CSR format: the entries of row i are start[i] .. start[i + 1] - 1.
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

// Throws ShapeError or std::invalid_argument, with this name of the rows, unless the starts ascend and
// all indices are inside the matrix.
template <class T>
void check_rows(const SparseRows<T>& rows, const char* name);

// The same for both orders. It throws, too, unless both orders have equally many entries. All functions below rely on this check.
template <class T>
void check_entries(const ObservedEntries<T>& entries);

// Sorts (row, column, value) triplets into rows, with ascending columns. Returns the input position
// of the first entry that is outside the matrix or repeats an earlier one, and -1 if there is none.
// If there is one, the output is incomplete. O(n + rows + cols), with 8 n + 8 max(rows, cols) bytes
// of scratch memory.
template <class T>
Index sort_entries(ArrayRef<const std::int64_t, 1> row, ArrayRef<const std::int64_t, 1> col,
                   ArrayRef<const T, 1> value, Index rows, Index cols,
                   ArrayRef<std::int64_t, 1> start, ArrayRef<std::int32_t, 1> index,
                   ArrayRef<T, 1> values);

// Writes the same entries in column order (CSC).
template <class T>
void transpose_entries(const SparseRows<T>& by_rows, ArrayRef<std::int64_t, 1> start,
                       ArrayRef<std::int32_t, 1> index, ArrayRef<T, 1> values);

// Computes E = Omega * (X^T Y - Phi) for X (k x m), Y (k x n): returns || E ||_F^2 and writes left
// = Y E^T (k x m) and right = X E (k x n). Each of the two outputs may be absent.
template <class T>
double residual_products(const ObservedEntries<T>& entries, MatrixRef<const T> x,
                         MatrixRef<const T> y, MatrixRef<T> left, MatrixRef<T> right,
                         const Context& context);

// Writes E = Omega * (M - Phi) as a dense matrix, zeros included; returns || E ||_F^2.
template <class T>
double masked_residual(const SparseRows<T>& by_rows, MatrixRef<const T> m, MatrixRef<T> error,
                       const Context& context);

// Linear measurements y = B vec(M) of an m x n matrix; vec(M) is in row-major order.
template <class T>
struct Measurements {
  MatrixRef<const T> operators;  // B, q x (m n)
  const T* values = nullptr;     // y, q numbers
};

// Computes r = B vec(M) - y: returns || r ||^2 and writes E = sum_i r_i B_i, the gradient of || r
// ||^2 / 2. Reads B once: 4 q m n flops. M and E are contiguous.
template <class T>
double measured_residual(const Measurements<T>& measurements, MatrixRef<const T> m,
                         MatrixRef<T> error, const Context& context);

}  // namespace dlnfast
