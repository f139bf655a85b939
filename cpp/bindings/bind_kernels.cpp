// SPDX-License-Identifier: MIT
// Products, decompositions, and what is known of a matrix in part.
#include "bindings.hpp"
#include "dlnfast/basis.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/singular_values.hpp"
#include "dlnfast/thin_product.hpp"
#include "functions.hpp"

namespace dlnfast::python {
namespace {

template <class E>
using Vector = Array<E, 1>;

Op op(bool transpose) { return transpose ? Op::transpose : Op::none; }

// How many starts there are for so many rows or columns, as far as indices of 32 bits reach.
Index n_starts(Index n, const std::string& name) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  if (n >= 0 && n <= most) return n + 1;
  throw ShapeError(name + " is " + std::to_string(n) + "; wanted 0 to " + std::to_string(most));
}

template <class T>
void thin_descend_to(const std::string& result, MatrixRef<const T> left, MatrixRef<const T> right,
                     MatrixRef<T> w, MatrixRef<T> out, const Descent<T>& descent,
                     const Context& context) {
  if (result != "none" && out.absent()) throw py::type_error("out is not a NumPy array");
  if (result == "rows") {
    thin_times_transpose_and_descend<T>(left, right, w, out, descent, context);
  } else if (result == "columns") {
    thin_times_and_descend<T>(left, right, w, out, descent, context);
  } else if (result == "none") {
    thin_descend<T>(left, right, w, descent, context);
  } else {
    throw std::invalid_argument("result is '" + result + "'; wanted rows, columns or none");
  }
}

}  // namespace

void bind_products(py::module_& m) {
  using py::arg;
  define<In, bool, In, bool, Out, Context>(
      m, "multiply", "out = op(a) op(b).",
      [](auto a, bool transpose_a, auto b, bool transpose_b, auto out, const Context& context) {
        multiply(a, op(transpose_a), b, op(transpose_b), out, context);
      },
      arg("a"), arg("transpose_a"), arg("b"), arg("transpose_b"), arg("out"), arg("n_threads") = 0);
  define<In, In, bool, Out, Context>(
      m, "thin_multiply", "out = x w, or x w^T, for a thin x of at most 64 rows.",
      [](auto x, auto w, bool transpose, auto out, const Context& context) {
        transpose ? thin_times_transpose(x, w, out, context) : thin_times(x, w, out, context);
      },
      arg("x"), arg("w"), arg("transpose"), arg("out"), arg("n_threads") = 0);
  define<In, In, Out, std::string, MaybeOut, MaybeOut, double, double, double, double, Context>(
      m, "thin_descend",
      "w descends along scale left^T right; out = right w^T (rows) or left w (columns) before it.",
      [](auto left, auto right, auto w, const std::string& result, auto out, auto velocity,
         double scale, double rate, double decay, double momentum, const Context& context) {
        using T = std::remove_reference_t<decltype(*w.data)>;
        thin_descend_to<T>(result, left, right, w, out,
                           {T(scale), T(rate), T(decay), T(momentum), velocity}, context);
      },
      arg("left"), arg("right"), arg("w"), arg("result"), arg("out"), arg("velocity"), arg("scale"),
      arg("learning_rate"), arg("weight_decay"), arg("momentum"), arg("n_threads") = 0);
  define<Out, Index, Out, double, Vector<double>, Context>(
      m, "extend_basis",
      "Appends to the first n_basis rows of basis what block has outside; returns how many rows.",
      [](auto basis, Index n_basis, auto block, double tolerance, auto lengths,
         const Context& context) {
        double* found = lengths.room(block.rows, {}, "lengths");
        return extend_basis(basis, n_basis, block, tolerance, found, context);
      },
      arg("basis"), arg("n_basis"), arg("block"), arg("tolerance"), arg("lengths"),
      arg("n_threads") = 0);
  define<In, Out, MaybeOut, MaybeOut, Context>(
      m, "singular_values",
      "The leading singular values (1, k) of w, and their vectors as columns.",
      [](auto w, auto values, auto left, auto right, const Context& context) {
        singular_values(w, values, left, right, context);
      },
      arg("w"), arg("values"), arg("left"), arg("right"), arg("n_threads") = 0);
  define<Vector<const double>, Vector<const double>, Index>(
      m, "bidiagonal_singular_values",
      "The k largest singular values of an upper bidiagonal matrix, descending.",
      [](auto diagonal, auto superdiagonal, Index k) {
        const auto copy = [](auto x) { return std::vector<double>(x.data, x.data + x.shape[0]); };
        // Only as many as there are; the core refuses any other k.
        std::vector<double> values(std::clamp<Index>(k, 0, diagonal.shape[0]));
        bidiagonal_singular_values(copy(diagonal), copy(superdiagonal), values.data(), k);
        return values;
      },
      arg("diagonal"), arg("superdiagonal"), arg("k"));
}

void bind_completion(py::module_& m) {
  using py::arg;
  define<Vector<const std::int64_t>, Vector<const std::int64_t>, Vector<const Number>, Index, Index,
         Vector<std::int64_t>, Vector<std::int32_t>, Vector<Number>>(
      m, "sort_entries",
      "Sorts entries by rows; returns the first that is outside or repeated, or -1.",
      [](auto row, auto col, auto value, Index rows, Index cols, auto start, auto index,
         auto values) {
        const Index n = row.shape[0];
        require_length(col.shape[0], n, "col");
        require_length(value.shape[0], n, "value");
        n_starts(cols, "cols");
        return sort_entries(n, row.data, col.data, value.data, rows, cols,
                            start.room(n_starts(rows, "rows"), {}, "start"),
                            index.room(n, {}, "index"), values.room(n, {}, "values"));
      },
      arg("row"), arg("col"), arg("value"), arg("rows"), arg("cols"), arg("start"), arg("index"),
      arg("values"));
  define<SparseRows<Number>, Index, Vector<std::int64_t>, Vector<std::int32_t>, Vector<Number>>(
      m, "transpose_entries", "The entries (start, index, values) column after column.",
      [](auto by_rows, Index cols, auto start, auto index, auto values) {
        by_rows.cols = cols;
        transpose_entries(by_rows, start.room(n_starts(cols, "cols"), {}, "start"),
                          index.room(by_rows.size, {}, "index"),
                          values.room(by_rows.size, {}, "values"));
      },
      arg("by_rows"), arg("cols"), arg("start"), arg("index"), arg("values"));
  define<ObservedEntries<Number>, In, In, MaybeOut, MaybeOut, Context>(
      m, "residual_products",
      "||E||^2 for E = Omega * (x^T y - Phi); left = y E^T and right = x E where they are given.",
      [](auto observed, auto x, auto y, auto left, auto right, const Context& context) {
        check_entries(observed);
        return residual_products(observed, x, y, left, right, context);
      },
      arg("observed"), arg("x"), arg("y"), arg("left"), arg("right"), arg("n_threads") = 0);
  define<ObservedEntries<Number>, In, Out, Context>(
      m, "masked_residual", "||E||^2 for error = E = Omega * (m - Phi).",
      [](auto observed, auto matrix, auto error, const Context& context) {
        check_entries(observed);
        return masked_residual(observed.by_rows, matrix, error, context);
      },
      arg("observed"), arg("m"), arg("error"), arg("n_threads") = 0);
  define<Measurements<Number>, In, Out, Context>(
      m, "measured_residual", "||r||^2 for r = B vec(m) - y; error = B^T r.",
      [](auto measurements, auto matrix, auto error, const Context& context) {
        return measured_residual(measurements, matrix, error, context);
      },
      arg("measurements"), arg("m"), arg("error"), arg("n_threads") = 0);
}

}  // namespace dlnfast::python
