// SPDX-License-Identifier: MIT
#include "dlnfast/svd_tracker.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "bindings.hpp"
#include "functions.hpp"
#include "tables.hpp"

namespace dlnfast::python {
namespace {

// y = x^T
template <class T>
void copy_transposed(MatrixRef<const T> x, MatrixRef<T> y) {
  for (Index i = 0; i < y.rows; ++i) {
    for (Index j = 0; j < y.cols; ++j) y.row(i)[j] = x.row(j)[i];
  }
}

// A matrix that Python knows the products of: matmat(X) is W X, rmatmat(Y) is W^T Y, with vectors as
// columns. Called with the GIL.
template <class T>
class PythonOperator final : public LinearOperator<T> {
 public:
  PythonOperator(Index rows, Index cols, py::object matmat, py::object rmatmat, double squared_norm)
      : rows_(rows),
        cols_(cols),
        matmat_(std::move(matmat)),
        rmatmat_(std::move(rmatmat)),
        squared_norm_(squared_norm) {}
  Index rows() const override { return rows_; }
  Index cols() const override { return cols_; }
  void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context&) const override {
    call(matmat_, x, y, "matmat");
  }
  void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y, const Context&) const override {
    call(rmatmat_, x, y, "rmatmat");
  }
  double norm(const Context&) const override {
    // A square that has all but vanished tells the size, but no longer to its own precision.
    const bool known = squared_norm_ == 0.0 || is_exact_square(squared_norm_);
    return known ? std::sqrt(squared_norm_) : std::numeric_limits<double>::quiet_NaN();
  }

 private:
  static void call(const py::object& function, MatrixRef<const T> x, MatrixRef<T> y,
                   const char* name) {
    const py::gil_scoped_acquire acquire;
    py::array_t<T> columns({x.cols, x.rows});
    copy_transposed<T>(x, {columns.mutable_data(), x.cols, x.rows});
    constexpr int aligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    const py::array_t<T, py::array::c_style | py::array::forcecast | aligned> result =
        function(columns);
    if (result.ndim() != 2 || result.shape(0) != y.cols || result.shape(1) != y.rows) {
      throw ShapeError(std::string(name) + " returned an array of another shape; wanted (" +
                       std::to_string(y.cols) + ", " + std::to_string(y.rows) + ")");
    }
    copy_transposed<T>({result.data(), y.cols, y.rows}, y);
  }

  Index rows_, cols_;
  py::object matmat_, rmatmat_;
  double squared_norm_;  // negative: unknown
};

TrackerSettings settings_of(const py::dict& given) {
  Call call;
  return checked(read_table<TrackerSettings>(call, given));
}

// A tracker with its lock: one update at a time.
template <class T>
class Tracker {
 public:
  Tracker(Index rows, Index cols, const py::dict& settings, int n_threads)
      : tracker_(rows, cols, settings_of(settings)), n_threads_(n_threads) {}

  py::dict update(const py::array& w, double drift) {
    Call call;
    const auto input = read_as<MatrixRef<const T>>(call, w, "W");
    return run(call, [&](const Context& context) { tracker_.update(input, drift, context); });
  }

  py::dict update_operator(const py::object& matmat, const py::object& rmatmat, double squared_norm,
                           double drift) {
    const PythonOperator<T> w(tracker_.rows(), tracker_.cols(), matmat, rmatmat, squared_norm);
    Call call;
    return run(call, [&](const Context& context) { tracker_.update(w, drift, context); });
  }

  // Keeps `w` as it is: the factored form refers to it. Returns how far it is from an isometry.
  py::tuple begin_factored(const py::array& w, Index limit) {
    Call call;
    const auto input = read_as<MatrixRef<const T>>(call, w, "W");
    Isometry isometry;
    run(call, [&](const Context& context) {
      require_shape(input, tracker_.rows(), tracker_.cols(), "W");
      isometry = measure_isometry<T>(input, context);
      auto next = std::make_unique<LowRankDrift<T>>(input, isometry, limit);
      tracker_.left();  // made of the old frames, if they are not yet
      factored_ = std::move(next);
      behind_ = false;
    });
    initial_ = w;
    return py::make_tuple(isometry.scale, isometry.departure, isometry.rigorous);
  }

  // Returns None where the frames no longer close, or an update was taken in but its event failed.
  py::object append(double factor, double scale, const py::array& left, const py::array& right) {
    if (!factored_) throw std::logic_error("there is no factored form to append to");
    Call call;
    const auto l = read_as<MatrixRef<const T>>(call, left, "A");
    const auto r = read_as<MatrixRef<const T>>(call, right, "B");
    if (behind_) return py::none();
    bool closed = false;
    py::dict record = run(call, [&](const Context& context) {
      factored_->update(factor, scale, l, r, context);
      behind_ = true;
      closed = factored_->flush(context);
      if (closed) tracker_.update(*factored_, context);
      behind_ = false;
    });
    // The tracker still refers to it, until its next event.
    if (!closed) return py::none();
    return std::move(record);
  }

  py::object vectors(bool left) {
    const std::unique_lock<std::mutex> lock = hold();
    const MatrixRef<const T> rows = left ? tracker_.left() : tracker_.right();
    if (rows.absent()) return py::none();
    py::array_t<T> columns({rows.cols, rows.rows});
    copy_transposed<T>(rows, {columns.mutable_data(), rows.cols, rows.rows});
    return std::move(columns);
  }

  void seed(const py::array& right) {
    Call call;
    const auto rows = read_as<MatrixRef<const T>>(call, right, "right");
    run(call, [&](const Context& context) { tracker_.seed(rows, context); });
  }

  void set_reference(const py::object& left, const py::object& right) {
    const std::unique_lock<std::mutex> lock = hold();
    if (left.is_none()) return tracker_.set_reference();
    Call call;
    const auto l = read_as<MatrixRef<const T>>(call, left, "left");
    tracker_.set_reference(l, read_as<MatrixRef<const T>>(call, right, "right"));
  }

  Index n_values() const { return tracker_.n_values(); }
  std::int64_t n_refreshes() const { return tracker_.n_refreshes(); }
  std::int64_t n_certificates() const { return tracker_.n_certificates(); }

 private:
  std::unique_lock<std::mutex> hold() {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock.owns_lock())
      throw std::runtime_error("this tracker is already at work in another thread");
    return lock;
  }

  template <class Body>
  py::dict run(Call& call, const Body& body) {
    const std::unique_lock<std::mutex> lock = hold();
    {
      const py::gil_scoped_release release;
      body(Context{n_threads_, &call.monitor});
    }
    return to_dict(tracker_.record());
  }

  SvdTracker<T> tracker_;
  int n_threads_;
  std::mutex busy_;
  std::unique_ptr<LowRankDrift<T>> factored_;
  bool behind_ = false;
  py::object initial_;
};

template <class T>
void bind_tracker(py::module_& m, const char* name) {
  using Class = Tracker<T>;
  py::class_<Class>(m, name, "Follows the leading singular values of a matrix that drifts.")
      .def(py::init<Index, Index, const py::dict&, int>(), py::arg("rows"), py::arg("cols"),
           py::arg("settings"), py::arg("n_threads") = 0)
      .def("update", &Class::update, py::arg("w"), py::arg("drift"))
      .def("update_operator", &Class::update_operator, py::arg("matmat"), py::arg("rmatmat"),
           py::arg("squared_norm"), py::arg("drift"))
      .def("begin_factored", &Class::begin_factored, py::arg("w"), py::arg("limit"))
      .def("append", &Class::append, py::arg("factor"), py::arg("scale"), py::arg("left"),
           py::arg("right"))
      .def("vectors", &Class::vectors, py::arg("left"))
      .def("seed", &Class::seed, py::arg("right"))
      .def("set_reference", &Class::set_reference, py::arg("left"), py::arg("right"))
      .def_property_readonly("n_values", &Class::n_values)
      .def_property_readonly("n_refreshes", &Class::n_refreshes)
      .def_property_readonly("n_certificates", &Class::n_certificates);
}

// Follows the pairs of all records of a run: values (n, p), left (n, p, a), right (n, p, b), whose
// vectors are rotated and flipped in place; ids and clusters (n, p).
void follow_branches(View<const double, 2> values, View<double, 3> left, View<double, 3> right,
                     double error, double cluster_tolerance, View<std::int64_t, 2> ids,
                     View<std::int64_t, 2> clusters, const Context& context) {
  const auto [n, p] = values.shape;
  const Index a = left.shape[2], b = right.shape[2];
  left.room(n, {p, a}, "left");
  right.room(n, {p, b}, "right");
  ids.room(n, {p}, "ids");
  clusters.room(n, {p}, "clusters");
  BranchSettings settings;
  settings.cluster_tolerance = cluster_tolerance;
  Branches<double> branches(settings);
  const std::vector<double> errors(static_cast<std::size_t>(p), error);
  for (Index i = 0; i < n; ++i) {
    const double* row = values.data + i * p;
    branches.follow(std::vector<double>(row, row + p), errors,
                    std::numeric_limits<double>::infinity(), {left.data + i * p * a, p, a},
                    {right.data + i * p * b, p, b}, context);
    std::copy(branches.ids().begin(), branches.ids().end(), ids.data + i * p);
    std::copy(branches.clusters().begin(), branches.clusters().end(), clusters.data + i * p);
  }
}

}  // namespace

void bind_svd_tracker(py::module_& m) {
  using py::arg;
  bind_tracker<float>(m, "SvdTracker32");
  bind_tracker<double>(m, "SvdTracker64");
  define<Array<const double, 2>, Array<double, 3>, Array<double, 3>, double, double,
         Array<std::int64_t, 2>, Array<std::int64_t, 2>, Context>(
      m, "follow_branches", "Names the branches of singular values through the records of a run.",
      &follow_branches, arg("values"), arg("left"), arg("right"), arg("error"),
      arg("cluster_tolerance"), arg("ids"), arg("clusters"), arg("n_threads") = 1);
  define<Array<const double, 2>>(
      m, "best_assignment", "The column of each row that makes the sum largest; -1 for none.",
      [](auto gain) {
        const auto [rows, cols] = gain.shape;
        return best_assignment({gain.data, gain.data + rows * cols}, rows, cols);
      },
      arg("gain"));
}

}  // namespace dlnfast::python
