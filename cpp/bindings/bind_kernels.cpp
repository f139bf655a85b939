// SPDX-License-Identifier: MIT
// Bindings of products, decompositions and partly known matrices.
#include "define.hpp"
#include "dlnfast/basis.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/row_posteriors.hpp"
#include "dlnfast/singular_values.hpp"
#include "dlnfast/thin_product.hpp"

namespace dlnfast::python {
namespace {

Op op(bool transpose) { return transpose ? Op::transpose : Op::none; }

template <class T>
void product(MatrixRef<const T> a, bool transpose_a, MatrixRef<const T> b, bool transpose_b,
             MatrixRef<T> out, const Context& context) {
  multiply<T>(a, op(transpose_a), b, op(transpose_b), out, context);
}

template <class T>
void thin_product(MatrixRef<const T> x, MatrixRef<const T> w, bool transpose, MatrixRef<T> out,
                  const Context& context) {
  transpose ? thin_times_transpose<T>(x, w, out, context) : thin_times<T>(x, w, out, context);
}

template <class T>
void transpose(SparseRows<T> by_rows, Index cols, ArrayRef<std::int64_t, 1> start,
               ArrayRef<std::int32_t, 1> index, ArrayRef<T, 1> values) {
  by_rows.cols = cols;
  transpose_entries<T>(by_rows, start, index, values);
}

template <class T>
double products(const ObservedEntries<T>& observed, MatrixRef<const T> x, MatrixRef<const T> y,
                MatrixRef<T> left, MatrixRef<T> right, const Context& context) {
  check_entries(observed);
  return residual_products<T>(observed, x, y, left, right, context);
}

template <class T>
double residual(const ObservedEntries<T>& observed, MatrixRef<const T> m, MatrixRef<T> error,
                const Context& context) {
  check_entries(observed);
  return masked_residual<T>(observed.by_rows, m, error, context);
}

template <class T>
void posteriors(SparseRows<T> entries, MatrixRef<const T> others, ArrayRef<const T, 1> weights,
                const std::optional<ArrayRef<const T, 1>>& entry_weights,
                ArrayRef<const T, 1> precisions, const RowPrior<T>& prior, bool uncertain,
                MatrixRef<T> moments, ArrayRef<double, 1> errors, const Context& context) {
  entries.cols = others.rows;
  row_posteriors<T>(entries, others, weights, entry_weights, precisions, prior, uncertain, moments,
                    errors, context);
}

}  // namespace

void bind_kernels(py::module_& m) {
  define(m, "multiply", "a, transpose_a, b, transpose_b, out, n_threads", "out = op(a) op(b).",
         product<float>, product<double>);
  define(m, "thin_multiply", "x, w, transpose, out, n_threads",
         "out = x w, or x w^T, for a thin x of at most 64 rows.", thin_product<float>,
         thin_product<double>);
  define(m, "thin_descend", "left, right, w, descent, n_threads",
         "w descends along scale left^T right.", thin_descend<float>, thin_descend<double>);
  define(m, "thin_times_and_descend", "left, right, w, out, descent, n_threads",
         "The same, after out = left w.", thin_times_and_descend<float>,
         thin_times_and_descend<double>);
  define(m, "thin_times_transpose_and_descend", "left, right, w, out, descent, n_threads",
         "The same, after out = right w^T.", thin_times_transpose_and_descend<float>,
         thin_times_transpose_and_descend<double>);
  define(
      m, "extend_basis", "basis, n_basis, block, tolerance, lengths, n_threads",
      "Appends to the first n_basis rows of basis what block has outside; returns how many rows.",
      extend_basis<float>, extend_basis<double>);
  define(m, "singular_values", "w, values, left, right, n_threads",
         "The leading singular values (1, k) of w, and their vectors as columns.",
         singular_values<float>, singular_values<double>);
  define(m, "bidiagonal_singular_values", "diagonal, superdiagonal, k",
         "The k largest singular values of an upper bidiagonal matrix, descending.",
         bidiagonal_singular_values);
  define(m, "sort_entries", "row, col, value, rows, cols, start, index, values",
         "Sorts entries by rows; returns the first that is outside or repeated, or -1.",
         sort_entries<float>, sort_entries<double>);
  define(m, "transpose_entries", "by_rows, cols, start, index, values",
         "The entries (start, index, values) column after column.", transpose<float>,
         transpose<double>);
  define(
      m, "residual_products", "observed, x, y, left, right, n_threads",
      "||E||^2 for E = Omega * (x^T y - Phi); left = y E^T and right = x E unless they are None.",
      products<float>, products<double>);
  define(m, "masked_residual", "observed, m, error, n_threads",
         "||E||^2 for error = E = Omega * (m - Phi).", residual<float>, residual<double>);
  define(m, "row_posteriors",
         "entries, others, weights, entry_weights, precisions, prior, uncertain, moments, errors, "
         "n_threads",
         "Posterior moments of one factor of a partly known matrix, given those of the other.",
         posteriors<float>, posteriors<double>);
  define(m, "measured_residual", "measurements, m, error, n_threads",
         "||r||^2 for r = B vec(m) - y; error = B^T r.", measured_residual<float>,
         measured_residual<double>);
}

}  // namespace dlnfast::python
