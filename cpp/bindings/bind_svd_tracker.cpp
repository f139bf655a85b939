// SPDX-License-Identifier: MIT
// Bindings of the tracker, whose updates read arrays or call operators in Python.
#include "dlnfast/svd_tracker.hpp"

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "define.hpp"

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
// columns. The caller holds both functions.
template <class T>
class PythonOperator final : public LinearOperator<T> {
 public:
  PythonOperator(Index rows, Index cols, py::handle matmat, py::handle rmatmat, double squared_norm)
      : rows_(rows), cols_(cols), matmat_(matmat), rmatmat_(rmatmat), squared_norm_(squared_norm) {}
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
  static void call(py::handle function, MatrixRef<const T> x, MatrixRef<T> y, const char* name) {
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
  py::handle matmat_, rmatmat_;
  double squared_norm_;  // negative: unknown
};

TrackerSettings settings_of(const py::dict& dict) {
  Call call;
  TrackerSettings settings;
  read(call, dict, "settings", settings);
  return settings;
}

// A tracker with its lock: one update at a time. What takes a Call runs without the GIL, with the lock.
template <class T>
class Tracker {
 public:
  Tracker(Index rows, Index cols, const py::dict& settings, int n_threads)
      : tracker_(rows, cols, settings_of(settings)), n_threads_(n_threads) {}

  std::unique_lock<std::mutex> hold() {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock.owns_lock())
      throw std::runtime_error("this tracker is already at work in another thread");
    return lock;
  }

  const TrackerRecord& update(Call& call, MatrixRef<const T> w, double drift) {
    return tracker_.update(w, drift, context(call));
  }

  const TrackerRecord& update_operator(Call& call, const py::object& matmat,
                                       const py::object& rmatmat, double squared_norm,
                                       double drift) {
    const PythonOperator<T> w(tracker_.rows(), tracker_.cols(), matmat, rmatmat, squared_norm);
    return tracker_.update(w, drift, context(call));
  }

  // Keeps `w` as it is: the factored form refers to it. Returns how far it is from an isometry.
  Isometry begin_factored(Call& call, MatrixRef<const T> w, Index limit) {
    require_shape(w, tracker_.rows(), tracker_.cols(), "W");
    const Isometry isometry = measure_isometry<T>(w, context(call));
    auto next = std::make_unique<LowRankDrift<T>>(w, isometry, limit);
    tracker_.left();  // made of the old frames, if they are not yet
    factored_ = std::move(next);
    behind_ = false;
    const py::gil_scoped_acquire acquire;
    beginning_ = std::move(call);
    return isometry;
  }

  // Returns no record if the frames no longer close, or if an earlier append failed midway.
  std::optional<TrackerRecord> append(Call& call, double factor, double scale,
                                      MatrixRef<const T> left, MatrixRef<const T> right) {
    if (!factored_) throw std::logic_error("there is no factored form to append to");
    if (behind_) return std::nullopt;
    factored_->update(factor, scale, left, right, context(call));
    behind_ = true;
    const bool closed = factored_->flush(context(call));
    // Keeps a form that is not closed: the tracker refers to it until its next update.
    if (closed) tracker_.update(*factored_, context(call));
    behind_ = false;
    return closed ? std::optional(tracker_.record()) : std::nullopt;
  }

  py::object vectors(bool left) {
    const auto lock = hold();
    const MatrixRef<const T> rows = left ? tracker_.left() : tracker_.right();
    if (rows.absent()) return py::none();
    py::array_t<T> columns({rows.cols, rows.rows});
    copy_transposed<T>(rows, {columns.mutable_data(), rows.cols, rows.rows});
    return std::move(columns);
  }

  void seed(Call& call, MatrixRef<const T> right) { tracker_.seed(right, context(call)); }

  void set_reference(Call&, std::optional<MatrixRef<const T>> left,
                     std::optional<MatrixRef<const T>> right) {
    if (!left) return tracker_.set_reference();
    tracker_.set_reference(*left, right.value_or(MatrixRef<const T>()));
  }

  Index n_values() const { return tracker_.n_values(); }
  std::int64_t n_refreshes() const { return tracker_.n_refreshes(); }
  std::int64_t n_certificates() const { return tracker_.n_certificates(); }

 private:
  Context context(Call& call) const { return {n_threads_, &call.monitor}; }

  SvdTracker<T> tracker_;
  int n_threads_;
  std::mutex busy_;
  std::unique_ptr<LowRankDrift<T>> factored_;
  bool behind_ = false;
  Call beginning_;  // of the factored form: holds its W_0
};

template <class T>
void bind_tracker(py::module_& m, const char* name) {
  using Class = Tracker<T>;
  using py::arg;
  py::class_<Class> c(m, name, "Tracks the leading singular values of a slowly changing matrix.");
  c.def(py::init<Index, Index, const py::dict&, int>(), arg("rows"), arg("cols"), arg("settings"),
        arg("n_threads") = 0);
  define(c, "update", "w, drift", &Class::update);
  define(c, "update_operator", "matmat, rmatmat, squared_norm, drift", &Class::update_operator);
  define(c, "begin_factored", "w, limit", &Class::begin_factored);
  define(c, "append", "factor, scale, left, right", &Class::append);
  define(c, "seed", "right", &Class::seed);
  define(c, "set_reference", "left, right", &Class::set_reference);
  c.def("vectors", &Class::vectors, arg("left"));
  c.def_property_readonly("n_values", &Class::n_values);
  c.def_property_readonly("n_refreshes", &Class::n_refreshes);
  c.def_property_readonly("n_certificates", &Class::n_certificates);
}

}  // namespace

void bind_svd_tracker(py::module_& m) {
  bind_tracker<float>(m, "SvdTracker32");
  bind_tracker<double>(m, "SvdTracker64");
  define(m, "follow_branches",
         "values, left, right, error, cluster_tolerance, ids, clusters, n_threads",
         "Names the branches of singular values through the records of a run.", follow_branches);
  define(m, "best_assignment", "gain",
         "The column of each row that makes the sum largest; -1 for none.", best_assignment);
}

}  // namespace dlnfast::python
