// SPDX-License-Identifier: MIT
#include "krylov_certificate.hpp"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "dlnfast/basis.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Largest numbers of random starts of a certificate, and of products of a start with M^T M.
constexpr Index max_starts = 8;
constexpr Index max_steps = 16;

}  // namespace

template <class T>
KrylovCertificate<T>::KrylovCertificate(const TrackerSettings& settings,
                                        SubspaceIteration<T>& subspace, Random& random)
    : settings_(settings), subspace_(subspace), random_(random) {}

template <class T>
void KrylovCertificate<T>::add_credit(Index n_columns) {
  credit_ += settings_.certificate_share * static_cast<double>(n_columns);
}

template <class T>
auto KrylovCertificate<T>::bound(const LinearOperator<T>& w, Index j, const Context& context)
    -> Result {
  ++count_;
  const Index m = subspace_.shape().m, n = subspace_.shape().n, k = subspace_.shape().k;
  const double rounding_bound = subspace_.rounding_bound();
  const Index n_wanted = subspace_.size() - j;
  const Index dims = n - j;
  const Index b = std::min(max_starts, dims);
  const Index max_size = std::min(b * max_steps, dims);
  safe_resize(basis_, max_size + 2 * b, n);
  safe_resize(images_, max_size + b, m);
  Matrix<double> gram = Matrix<double>::Zero(max_size + b, max_size + b);
  const MatrixRef<const T> u = top(subspace_.measured().left, j);
  const MatrixRef<const T> v = top(subspace_.measured().right, j);
  append_start(b, v, context);

  const double starts = static_cast<double>(b);
  const double log_term =
      std::log(1.648 * std::sqrt(static_cast<double>(dims))) - std::log(settings_.failure) / starts;
  const double overlap = std::pow(settings_.failure, 1.0 / starts) / 0.8;
  const double amplification = std::sqrt(static_cast<double>(dims)) / overlap;
  const double target_accuracy = settings_.tolerance * subspace_.reported().values[0];

  double theta = 0.0, bound = infinity;
  Index size = 0;
  Index n_new = b;
  for (Index step = 1; n_new > 0; ++step) {
    context.poll();
    const MatrixRef<T> y = MatrixRef<T>(images_).block(size, 0, n_new, m);
    w.apply(MatrixRef<T>(basis_).block(size, 0, n_new, n), y, context);
    project_out<T>(y, u, context);
    const double scale = append_products(size, n_new, gram, context);
    size += n_new;

    // The next block; its part outside the space is A Q - Q T.
    const MatrixRef<T> next = MatrixRef<T>(basis_).block(size, 0, n_new, n);
    w.apply_transpose(y, next, context);
    project_out<T>(next, v, context);
    project_out<T>(next, top(basis_, size), context);
    const double outside = static_cast<double>(next.map().norm());
    // Drop shorter directions; `outside` includes them.
    const double tiny =
        std::pow(epsilon<T>(), 0.75) * std::max({scale, square(theta), square(rounding_bound)});
    const bool is_full = size >= max_size || step == max_steps;
    n_new = is_full ? 0 : orthonormalize_next(next, size, v, tiny, context);
    if (step > 1 && step % 2 == 1 && n_new > 0) continue;

    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(gram.topLeftCorner(size, size),
                                                               Eigen::EigenvaluesOnly);
    theta = std::sqrt(std::max(eigen.eigenvalues()[size - 1], 0.0));
    const double root = log_term / (2.0 * static_cast<double>(step) - 1.0);
    const double rounding = 8.0 * epsilon<T>() * square(theta);
    double best = std::sqrt(square(theta) + (outside + rounding) * amplification);  // (2)
    if (root < 1.0) best = std::min(best, theta / std::sqrt(1.0 - square(root)));   // (1)
    if (size == dims) best = theta;
    bound = std::min(bound, best + rounding_bound);
    // Stop if the tracked values are well above the bound, or if the bound itself is sharp.
    const double separation = j >= k && j > 0 ? subspace_.measured().values[j - 1] - theta : 0.0;
    if (size >= n_wanted && bound - theta <= std::max(0.25 * target_accuracy, 0.25 * separation))
      break;
  }
  // Narrow products take about twice the time per vector.
  const Index n_columns = 2 * size;
  credit_ -= 2.0 * static_cast<double>(n_columns);
  is_closed_ = n_new == 0 && size < max_size;
  find_ritz_vectors(gram, size, j, context);
  return {theta, {bound, Completeness::probabilistic}, n_columns};
}

// Sets the first rows of the basis to random vectors, orthonormal and orthogonal to v.
template <class T>
void KrylovCertificate<T>::append_start(Index n_starts, MatrixRef<const T> v,
                                        const Context& context) {
  const MatrixRef<T> block = MatrixRef<T>(basis_).block(0, 0, n_starts, basis_.cols());
  random_.fill(block);
  project_out<T>(block, v, context);
  orthonormalize<T>(block, random_, context);
  project_out<T>(block, v, context);
}

// Appends to `gram` the inner products of the images size .. size + n_new - 1 with all images up to
// these. Returns the largest absolute value.
template <class T>
double KrylovCertificate<T>::append_products(Index size, Index n_new, Matrix<double>& gram,
                                             const Context& context) {
  const MatrixRef<T> y = MatrixRef<T>(images_).block(size, 0, n_new, images_.cols());
  const Index total = size + n_new;
  Matrix<T> products(n_new, total);
  multiply<T>(y, Op::none, top(images_, total), Op::transpose, MatrixRef<T>(products), context);
  gram.block(size, 0, n_new, total) = products.template cast<double>();
  gram.block(0, size, total, n_new) = products.template cast<double>().transpose();
  if (!products.allFinite()) {
    throw std::domain_error("products with the tracked matrix are not finite");
  }
  return products.cwiseAbs().maxCoeff();
}

// Orthonormalises the next Krylov block, which is orthogonal to v and to the basis. Returns its
// number of rows: directions longer than `tiny`.
template <class T>
Index KrylovCertificate<T>::orthonormalize_next(MatrixRef<T> next, Index size, MatrixRef<const T> v,
                                                double tiny, const Context& context) {
  Matrix<T> block = next.map();
  std::vector<double> lengths(static_cast<std::size_t>(next.rows));
  const Index rank =
      extend_basis<T>(next, 0, MatrixRef<T>(block), tiny, as_array(lengths), context);
  if (rank == 0) return 0;
  // The division by the lengths amplified rounding errors along v and the basis.
  const MatrixRef<T> new_block = next.block(0, 0, rank, next.cols);
  project_out<T>(new_block, v, context);
  project_out<T>(new_block, top(basis_, size), context);
  orthonormalize<T>(new_block, random_, context);
  return rank;
}

// Computes the leading Ritz vectors, which complete a block of j others.
template <class T>
void KrylovCertificate<T>::find_ritz_vectors(const Matrix<double>& gram, Index size, Index j,
                                             const Context& context) {
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(gram.topLeftCorner(size, size));
  std::vector<Index> chosen;
  if (is_closed_) {
    chosen = choose_around_shared(eigen.eigenvalues(), j);
  } else {
    for (Index i = size - 1; i >= 0; --i) chosen.push_back(i);
  }
  const Index n_chosen = std::min(subspace_.size() - j, size);
  Matrix<T> coefficients(n_chosen, size);
  for (Index i = 0; i < n_chosen; ++i) {
    coefficients.row(i) = eigen.eigenvectors().col(chosen[i]).transpose().template cast<T>();
  }
  safe_resize(ritz_vectors_, n_chosen, basis_.cols());
  multiply<T>(view(coefficients), Op::none, top(basis_, size), Op::none,
              MatrixRef<T>(ritz_vectors_), context);
}

// Returns the order of the Ritz values (ascending) for an invariant Krylov space. Few values then
// differ from a value that most directions share. The values above it come first, then as many
// copies of it as are reported, then the values below it: in layers with an orthogonal start, these
// rotate together with the ones above. Grows the subspace if they do not fit.
template <class T>
std::vector<Index> KrylovCertificate<T>::choose_around_shared(const Eigen::VectorXd& values,
                                                              Index j) {
  const Index size = values.size(), k = subspace_.shape().k, p = subspace_.size();
  // The space has as many copies of the shared value as there were starts, and one of each other
  // value.
  const double equal = 1e-9 * std::abs(values[size - 1]);
  double middle = values[size - 1];
  Index max_copies = 0;
  for (Index begin = 0; begin < size;) {
    Index end = begin + 1;
    while (end < size && values[end] - values[end - 1] <= equal) ++end;
    if (end - begin >= max_copies) {
      max_copies = end - begin;
      middle = values[begin + max_copies / 2];
    }
    begin = end;
  }
  std::vector<Index> above, shared, below;
  for (Index i = size - 1; i >= 0; --i) {
    const double difference = values[i] - middle;
    (difference > equal ? above : (difference < -equal ? below : shared)).push_back(i);
  }
  std::reverse(below.begin(), below.end());
  const Index n_above = j + static_cast<Index>(above.size());
  const Index n_shared = std::clamp<Index>(k - n_above, 0, static_cast<Index>(shared.size()));
  const Index needed = n_above + n_shared + static_cast<Index>(below.size());
  const Index max_grown_size = std::min(std::max(p, thin_limit), subspace_.shape().smaller / 3);
  if (needed > p) subspace_.grow(std::min(needed, std::max(max_grown_size, p)));
  n_above_shared_ = std::min({n_above, k, subspace_.size() - 1});
  std::vector<Index> chosen = above;
  chosen.insert(chosen.end(), shared.begin(), shared.begin() + n_shared);
  chosen.insert(chosen.end(), below.begin(), below.end());
  chosen.insert(chosen.end(), shared.begin() + n_shared, shared.end());
  return chosen;
}

template class KrylovCertificate<float>;
template class KrylovCertificate<double>;

}  // namespace dlnfast
