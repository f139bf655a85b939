// SPDX-License-Identifier: MIT
#include "dlnfast/svd_tracker.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "array_view.hpp"
#include "bindings.hpp"
#include "footprints.hpp"
#include "interrupt.hpp"
#include "tracker_settings.hpp"

namespace dlnfast::python {
namespace {

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

py::dict as_dict(const TrackerRecord& r) {
  const auto array = [](const auto& list) {
    using Entry = typename std::decay_t<decltype(list)>::value_type;
    return py::array_t<Entry>(static_cast<py::ssize_t>(list.size()), list.data());
  };
  py::dict d;
  d["event"] = r.event;
  d["tier"] = static_cast<int>(r.tier);
  d["completeness"] = static_cast<int>(r.completeness);
  d["refreshed"] = r.refreshed;
  d["values"] = array(r.values);
  d["errors"] = array(r.errors);
  d["gaps"] = array(r.gaps);
  d["signs"] = array(r.signs);
  d["clusters"] = array(r.clusters);
  d["branches"] = array(r.branches);
  d["left_angles"] = array(r.left_angles);
  d["right_angles"] = array(r.right_angles);
  d["left_block"] = py::make_tuple(r.left_block.largest, r.left_block.frobenius);
  d["right_block"] = py::make_tuple(r.right_block.largest, r.right_block.frobenius);
  d["norm"] = r.norm;
  d["tail"] = r.tail;
  d["drift"] = r.drift;
  d["vector_error"] = r.vector_error;
  d["truncated"] = r.truncated;
  d["orthogonality"] = r.orthogonality;
  d["overlap"] = r.overlap;
  d["rho"] = r.rho;
  d["rho_spread"] = r.rho_spread;
  d["multiplicity"] = r.multiplicity;
  d["seconds"] = r.seconds;
  d["n_columns"] = r.n_columns;
  return d;
}

// A tracker with its lock: one event at a time.
template <class T>
class Tracker {
 public:
  Tracker(Index rows, Index cols, const py::dict& settings, int n_threads)
      : tracker_(rows, cols, tracker_settings(settings)), n_threads_(n_threads) {}

  py::dict update(const py::array& w, double drift) {
    const auto input = matrix<T>(w, "W");
    return run([&](const Context& context) { tracker_.update(input, drift, context); });
  }

  py::dict update_operator(const py::object& matmat, const py::object& rmatmat, double squared_norm,
                           double drift) {
    const PythonOperator<T> w(tracker_.rows(), tracker_.cols(), matmat, rmatmat, squared_norm);
    return run([&](const Context& context) { tracker_.update(w, drift, context); });
  }

  // Keeps `w` as it is: the factored form refers to it. Returns how far it is from an isometry.
  py::tuple begin_factored(const py::array& w, Index limit) {
    const auto input = matrix<T>(w, "W");
    Isometry isometry;
    run([&](const Context& context) {
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
    const auto l = matrix<T>(left, "A");
    const auto r = matrix<T>(right, "B");
    if (behind_) return py::none();
    bool closed = false;
    py::dict record = run([&](const Context& context) {
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
    const auto rows = matrix<T>(right, "right");
    run([&](const Context& context) { tracker_.seed(rows, context); });
  }

  void set_reference(const py::object& left, const py::object& right) {
    const std::unique_lock<std::mutex> lock = hold();
    if (left.is_none()) return tracker_.set_reference();
    tracker_.set_reference(matrix<T>(left, "left"), matrix<T>(right, "right"));
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
  py::dict run(const Body& body) {
    const std::unique_lock<std::mutex> lock = hold();
    Monitor monitor = listening();
    {
      const py::gil_scoped_release release;
      body(Context{n_threads_, &monitor});
    }
    return as_dict(tracker_.record());
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
void follow_branches(const py::array& values, const py::array& left, const py::array& right,
                     double error, double cluster_tolerance, const py::array& ids,
                     const py::array& clusters) {
  const py::array v = checked_array<double>(values, 2, "values");
  const Index n = v.shape(0), p = v.shape(1);
  const py::array l = checked_array<double>(left, 3, "left");
  const py::array r = checked_array<double>(right, 3, "right");
  const Index a = l.shape(2), b = r.shape(2);
  const auto* value = static_cast<const double*>(v.data());
  auto* left_rows = records<double>(left, n, {p, a}, "left");
  auto* right_rows = records<double>(right, n, {p, b}, "right");
  auto* id = records<std::int64_t>(ids, n, {p}, "ids");
  auto* cluster = records<std::int64_t>(clusters, n, {p}, "clusters");
  Footprints footprints;
  footprints.reads(values, "values").writes(left, "left").writes(right, "right");
  footprints.writes(ids, "ids").writes(clusters, "clusters").require_apart();
  Monitor monitor = listening();
  const py::gil_scoped_release release;
  const Context context{1, &monitor};
  BranchSettings settings;
  settings.cluster_tolerance = cluster_tolerance;
  Branches<double> branches(settings);
  const std::vector<double> errors(static_cast<std::size_t>(p), error);
  for (Index i = 0; i < n; ++i) {
    branches.follow(std::vector<double>(value + i * p, value + (i + 1) * p), errors,
                    std::numeric_limits<double>::infinity(),
                    MatrixRef<double>(left_rows + i * p * a, p, a),
                    MatrixRef<double>(right_rows + i * p * b, p, b), context);
    std::copy(branches.ids().begin(), branches.ids().end(), id + i * p);
    std::copy(branches.clusters().begin(), branches.clusters().end(), cluster + i * p);
  }
}

}  // namespace

void bind_svd_tracker(py::module_& m) {
  bind_tracker<float>(m, "SvdTracker32");
  bind_tracker<double>(m, "SvdTracker64");
  m.def("follow_branches", &follow_branches, py::arg("values"), py::arg("left"), py::arg("right"),
        py::arg("error"), py::arg("cluster_tolerance"), py::arg("ids"), py::arg("clusters"),
        "Names the branches of singular values through the records of a run.");
  m.def(
      "best_assignment",
      [](const py::array& gain) {
        const auto g = matrix<double>(gain, "gain");
        return best_assignment(std::vector<double>(g.data, g.data + g.rows * g.cols), g.rows,
                               g.cols);
      },
      py::arg("gain"), "The column of each row that makes the sum largest; -1 for none.");
}

}  // namespace dlnfast::python
