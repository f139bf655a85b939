// SPDX-License-Identifier: MIT
#include "dlnfast/singular_values.hpp"

#include <Eigen/QR>
#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <future>
#include <limits>
#include <memory>
#include <system_error>
#include <thread>

#include "dlnfast/errors.hpp"

namespace dlnfast {
namespace {

// Decompositions above this many flops (about 50 ms) run on their own thread, so that the caller
// can poll.
constexpr double max_flops_on_caller = 1e9;

// Always in double precision: this is more accurate for float input, and halves the compile time of
// the slowest file. What Eigen's SVD does not compile itself is written as loops, because every
// further kind of product or expression would take seconds to compile.
struct Decomposition {
  // A row-major W is W^T for a column-major routine: left and right are exchanged.
  Eigen::MatrixXd transposed;
  bool vectors = false;
  Eigen::BDCSVD<Eigen::MatrixXd> svd;
  double scale = 1.0;
  Eigen::ColPivHouseholderQR<Eigen::MatrixXd> qr;
  bool is_of_factor = false;  // whether `svd` is that of R P^T, where W^T P = Q R

  // Eigen passes tall matrices of few columns to JacobiSVD, which frees its QR factors twice if
  // their allocation fails. Therefore the QR factorisation is done here and Eigen receives R P^T.
  void compute() {
    const int options = vectors ? Eigen::ComputeThinU | Eigen::ComputeThinV : 0;
    const Index n = transposed.cols();
    if (n >= 16 || transposed.rows() <= n) {
      svd.compute(transposed, options);
      return;
    }
    scale = transposed.cwiseAbs().maxCoeff();
    if (scale == 0.0) scale = 1.0;
    transposed /= scale;
    qr.compute(transposed);
    is_of_factor = true;
    Eigen::MatrixXd factor = Eigen::MatrixXd::Zero(n, n);
    for (Index j = 0; j < n; ++j) {
      const Index column = qr.colsPermutation().indices()[j];
      for (Index i = 0; i <= j; ++i) factor(i, column) = qr.matrixQR()(i, j);
    }
    svd.compute(factor, options);
  }

  // Writes the leading singular vectors of W^T, in the row-major order of W's right ones.
  template <class T>
  void store_right(const MatrixRef<T>& right) const {
    if (!is_of_factor) {
      right.map() = svd.matrixU().leftCols(right.cols).template cast<T>();
      return;
    }
    // Q [u; 0] = H_1 .. H_n [u; 0] with H_i = I - tau_i v_i v_i^T
    const Index rows = transposed.rows(), n = transposed.cols();
    Eigen::VectorXd vector(rows);
    for (Index c = 0; c < right.cols; ++c) {
      vector.setZero();
      for (Index i = 0; i < n; ++i) vector[i] = svd.matrixU()(i, c);
      for (Index i = n - 1; i >= 0; --i) {
        const auto tail = qr.matrixQR().col(i).tail(rows - i - 1);
        const double factor = qr.hCoeffs()[i] * (vector[i] + tail.dot(vector.tail(rows - i - 1)));
        vector[i] -= factor;
        vector.tail(rows - i - 1) -= factor * tail;
      }
      for (Index i = 0; i < rows; ++i) right.row(i)[c] = static_cast<T>(vector[i]);
    }
  }
};

// Runs the decomposition on a separate thread, which owns its data. An interrupted caller returns
// at once, and the thread ends when it is finished.
void compute_on_own_thread(const std::shared_ptr<Decomposition>& d, const Context& context) {
  const auto task = std::make_shared<std::packaged_task<void()>>([d] { d->compute(); });
  std::future<void> done = task->get_future();
  try {
    std::thread([task] { (*task)(); }).detach();
  } catch (const std::system_error&) {
    (*task)();  // no thread available: run here, uninterruptible
  }
  while (done.wait_for(std::chrono::milliseconds(20)) != std::future_status::ready) {
    context.poll();
  }
  done.get();
}

}  // namespace

template <class T>
void singular_values(MatrixRef<const T> w, MatrixRef<T> values, MatrixRef<T> left,
                     MatrixRef<T> right, const Context& context) {
  const Index k = values.cols;
  const Index smaller = std::min(w.rows, w.cols);
  require_shape(values, 1, std::min(k, smaller), "singular values");
  const bool vectors = !left.absent() || !right.absent();
  if (!left.absent()) require_shape(left, w.rows, k, "left singular vectors");
  if (!right.absent()) require_shape(right, w.cols, k, "right singular vectors");
  if (k == 0) return;
  if (!w.map().allFinite()) throw std::domain_error("a matrix to decompose is not finite");

  auto d = std::make_shared<Decomposition>();
  d->transposed = w.map().transpose().template cast<double>();
  d->vectors = vectors;
  const double flops = (vectors ? 20.0 : 4.0) * static_cast<double>(w.rows) *
                       static_cast<double>(w.cols) * static_cast<double>(smaller);
  if (flops < max_flops_on_caller || context.monitor == nullptr) {
    context.poll();
    d->compute();
  } else {
    compute_on_own_thread(d, context);
  }
  values.map() = (d->scale * d->svd.singularValues().head(k)).transpose().template cast<T>();
  if (!left.absent()) left.map() = d->svd.matrixV().leftCols(k).template cast<T>();
  if (!right.absent()) d->store_right(right);
}

template void singular_values<float>(MatrixRef<const float>, MatrixRef<float>, MatrixRef<float>,
                                     MatrixRef<float>, const Context&);
template void singular_values<double>(MatrixRef<const double>, MatrixRef<double>, MatrixRef<double>,
                                      MatrixRef<double>, const Context&);

namespace {

// Returns the number of singular values of a bidiagonal matrix above x >= 0. It equals the number
// of eigenvalues above x of the symmetric tridiagonal matrix with zero diagonal and off-diagonal
// a_1, b_1, a_2, .., a_n (Golub and Kahan), counted by the signs of its pivots.
Index count_above(const std::vector<double>& squared_off, double x) {
  Index n_above = 0;
  double pivot = -x;
  for (const double square : squared_off) {
    if (pivot == 0.0) pivot = -std::numeric_limits<double>::min();
    pivot = -x - square / pivot;
    if (pivot > 0.0) ++n_above;
  }
  return n_above;
}

}  // namespace

std::vector<double> bidiagonal_singular_values(ArrayRef<const double, 1> diagonal,
                                               ArrayRef<const double, 1> superdiagonal, Index k) {
  const Index n = diagonal.shape[0];
  require_length(superdiagonal.shape[0], std::max<Index>(n - 1, 0), "superdiagonal");
  if (k < 0 || k > n) {
    throw ShapeError("k is " + std::to_string(k) + "; wanted 0 to " + std::to_string(n));
  }
  double size = 0.0;
  for (const auto* entries : {&diagonal, &superdiagonal}) {
    for (Index i = 0; i < entries->shape[0]; ++i) {
      const double entry = entries->data[i];
      if (!std::isfinite(entry)) {
        throw std::domain_error("a bidiagonal matrix to decompose is not finite");
      }
      size = std::max(size, std::abs(entry));
    }
  }
  std::vector<double> values(static_cast<std::size_t>(k), 0.0);
  if (size == 0.0) return values;
  // Scaled, so that squares neither overflow nor underflow.
  std::vector<double> squared_off;
  squared_off.reserve(static_cast<std::size_t>(2 * n));
  const auto add = [&](double entry) { squared_off.push_back((entry / size) * (entry / size)); };
  for (Index i = 0; i < n; ++i) {
    add(diagonal.data[i]);
    if (i + 1 < n) add(superdiagonal.data[i]);
  }
  const Index n_positive =
      std::min(k, count_above(squared_off, std::numeric_limits<double>::min()));
  double upper = 2.0;  // Gershgorin: two entries of at most 1 in each row
  for (Index j = 0; j < n_positive; ++j) {
    double low = 0.0;
    double high = upper;
    // Bisect until no double lies between, so that values of any size have full relative precision.
    while (true) {
      const double middle = 0.5 * (low + high);
      if (middle <= low || middle >= high) break;
      (count_above(squared_off, middle) > j ? low : high) = middle;
    }
    values[j] = size * high;
    upper = high;
  }
  return values;
}

}  // namespace dlnfast
