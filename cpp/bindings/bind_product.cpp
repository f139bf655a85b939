// SPDX-License-Identifier: MIT
#include "array_view.hpp"
#include "bindings.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/thin_product.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"

namespace dlnfast::python {
namespace {

template <class T>
void multiply_arrays(const py::array& a, bool transpose_a, const py::array& b, bool transpose_b,
                     const py::array& out, int n_threads) {
  const auto lhs = matrix<T>(a, "a");
  const auto rhs = matrix<T>(b, "b");
  const auto result = writable_matrix<T>(out, "out");
  Footprints().reads(a, "a").reads(b, "b").writes(out, "out").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  multiply<T>(lhs, transpose_a ? Op::transpose : Op::none, rhs,
              transpose_b ? Op::transpose : Op::none, result, Context{n_threads, &monitor});
}

template <class T>
void thin_arrays(const py::array& x, const py::array& w, bool transpose, const py::array& out,
                 int n_threads) {
  const auto thin = matrix<T>(x, "x");
  const auto wide = matrix<T>(w, "w");
  const auto result = writable_matrix<T>(out, "out");
  Footprints().reads(x, "x").reads(w, "w").writes(out, "out").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  const Context context{n_threads, &monitor};
  if (transpose) {
    thin_times_transpose<T>(thin, wide, result, context);
  } else {
    thin_times<T>(thin, wide, result, context);
  }
}

template <class T>
void thin_descend_arrays(const py::array& left, const py::array& right, const py::array& w,
                         const std::string& result, const py::object& out,
                         const py::object& velocity, double scale, double learning_rate,
                         double weight_decay, double momentum, int n_threads) {
  const auto l = matrix<T>(left, "left");
  const auto r = matrix<T>(right, "right");
  const auto weight = writable_matrix<T>(w, "w");
  Descent<T> descent;
  descent.scale = static_cast<T>(scale);
  descent.learning_rate = static_cast<T>(learning_rate);
  descent.weight_decay = static_cast<T>(weight_decay);
  descent.momentum = static_cast<T>(momentum);
  if (!velocity.is_none()) descent.velocity = writable_matrix<T>(velocity, "velocity");
  MatrixRef<T> y;
  Footprints footprints;
  footprints.reads(left, "left").reads(right, "right").writes(w, "w").writes(velocity, "velocity");
  if (result != "none") {
    y = writable_matrix<T>(out, "out");
    footprints.writes(out, "out");
  }
  footprints.require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  const Context context{n_threads, &monitor};
  if (result == "rows") {
    thin_times_transpose_and_descend<T>(l, r, weight, y, descent, context);
  } else if (result == "columns") {
    thin_times_and_descend<T>(l, r, weight, y, descent, context);
  } else if (result == "none") {
    thin_descend<T>(l, r, weight, descent, context);
  } else {
    throw std::invalid_argument("result is '" + result + "'; wanted rows, columns or none");
  }
}

}  // namespace

void bind_product(py::module_& m) {
  m.def(
      "multiply",
      [](const py::array& a, bool transpose_a, const py::array& b, bool transpose_b,
         const py::array& out, int n_threads) {
        const auto run = is_single(a) ? &multiply_arrays<float> : &multiply_arrays<double>;
        run(a, transpose_a, b, transpose_b, out, n_threads);
      },
      py::arg("a"), py::arg("transpose_a"), py::arg("b"), py::arg("transpose_b"), py::arg("out"),
      py::arg("n_threads") = 0, "out = op(a) op(b).");
  m.def(
      "thin_multiply",
      [](const py::array& x, const py::array& w, bool transpose, const py::array& out,
         int n_threads) {
        const auto run = is_single(x) ? &thin_arrays<float> : &thin_arrays<double>;
        run(x, w, transpose, out, n_threads);
      },
      py::arg("x"), py::arg("w"), py::arg("transpose"), py::arg("out"), py::arg("n_threads") = 0,
      "out = x w, or x w^T, for a thin x of at most 64 rows.");
  m.def(
      "thin_descend",
      [](const py::array& left, const py::array& right, const py::array& w,
         const std::string& result, const py::object& out, const py::object& velocity, double scale,
         double learning_rate, double weight_decay, double momentum, int n_threads) {
        const auto run =
            is_single(left) ? &thin_descend_arrays<float> : &thin_descend_arrays<double>;
        run(left, right, w, result, out, velocity, scale, learning_rate, weight_decay, momentum,
            n_threads);
      },
      py::arg("left"), py::arg("right"), py::arg("w"), py::arg("result"), py::arg("out"),
      py::arg("velocity"), py::arg("scale"), py::arg("learning_rate"), py::arg("weight_decay"),
      py::arg("momentum"), py::arg("n_threads") = 0,
      "w descends along scale left^T right; out = right w^T (rows) or left w (columns) before it.");
}

}  // namespace dlnfast::python
