// SPDX-License-Identifier: MIT
#include "krylov_certificate.hpp"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "dlnfast/basis.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/renew.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Random starts of a certificate, and the most products of a start with M^T M.
constexpr Index most_starts = 8;
constexpr Index most_steps = 16;

}  // namespace

template <class T>
KrylovCertificate<T>::KrylovCertificate(const TrackerSettings& settings,
                                        SubspaceIteration<T>& subspace, Random& random)
    : settings_(settings), subspace_(subspace), random_(random) {}

template <class T>
void KrylovCertificate<T>::earn(Index n_columns) {
  credit_ += settings_.certificate_share * static_cast<double>(n_columns);
}

template <class T>
auto KrylovCertificate<T>::bound(const LinearOperator<T>& w, Index j, const Context& context)
    -> Result {
  ++count_;
  const Index m = subspace_.shape().m, n = subspace_.shape().n, k = subspace_.shape().k;
  const double slack = subspace_.slack();
  const Index wanted = subspace_.size() - j;
  const Index dims = n - j;
  const Index b = std::min(most_starts, dims);
  const Index room = std::min(b * most_steps, dims);
  renew(basis_, room + 2 * b, n);
  renew(images_, room + b, m);
  Matrix<double> gram = Matrix<double>::Zero(room + b, room + b);
  const MatrixRef<const T> u = top(subspace_.measured().left, j);
  const MatrixRef<const T> v = top(subspace_.measured().right, j);
  append_start(b, v, context);

  const double starts = static_cast<double>(b);
  const double reach =
      std::log(1.648 * std::sqrt(static_cast<double>(dims))) - std::log(settings_.failure) / starts;
  const double overlap = std::pow(settings_.failure, 1.0 / starts) / 0.8;
  const double blow_up = std::sqrt(static_cast<double>(dims)) / overlap;
  const double enough = settings_.tolerance * subspace_.reported().values[0];

  double theta = 0.0, bound = infinity;
  Index size = 0;
  Index fresh = b;
  for (Index step = 1; fresh > 0; ++step) {
    context.breathe();
    const MatrixRef<T> y = MatrixRef<T>(images_).block(size, 0, fresh, m);
    w.apply(MatrixRef<T>(basis_).block(size, 0, fresh, n), y, context);
    project_out<T>(y, u, context);
    const double scale = append_products(size, fresh, gram, context);
    size += fresh;

    // The next block; its part outside the space is A Q - Q T.
    const MatrixRef<T> next = MatrixRef<T>(basis_).block(size, 0, fresh, n);
    w.apply_transpose(y, next, context);
    project_out<T>(next, v, context);
    project_out<T>(next, top(basis_, size), context);
    const double outside = static_cast<double>(next.map().norm());
    // Shorter directions are left out: `outside` counts them.
    const double tiny =
        std::pow(epsilon<T>(), 0.75) * std::max({scale, square(theta), square(slack)});
    const bool is_full = size >= room || step == most_steps;
    fresh = is_full ? 0 : orthonormalize_next(next, size, v, tiny, context);
    if (step > 1 && step % 2 == 1 && fresh > 0) continue;

    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(gram.topLeftCorner(size, size),
                                                               Eigen::EigenvaluesOnly);
    theta = std::sqrt(std::max(eigen.eigenvalues()[size - 1], 0.0));
    const double root = reach / (2.0 * static_cast<double>(step) - 1.0);
    const double rounding = 8.0 * epsilon<T>() * square(theta);
    double best = std::sqrt(square(theta) + (outside + rounding) * blow_up);       // (2)
    if (root < 1.0) best = std::min(best, theta / std::sqrt(1.0 - square(root)));  // (1)
    if (size == dims) best = theta;
    bound = std::min(bound, best + slack);
    // Good where the tracked values stand clear of the bound, or where the bound itself is sharp.
    const double clear = j >= k && j > 0 ? subspace_.measured().values[j - 1] - theta : 0.0;
    if (size >= wanted && bound - theta <= std::max(0.25 * enough, 0.25 * clear)) break;
  }
  // Narrow products take about twice as long for each vector.
  const Index n_columns = 2 * size;
  credit_ -= 2.0 * static_cast<double>(n_columns);
  is_closed_ = fresh == 0 && size < room;
  find_ritz_vectors(gram, size, j, context);
  return {theta, {bound, Completeness::probabilistic}, n_columns};
}

// Random vectors, orthonormal and orthogonal to v: the first rows of the basis.
template <class T>
void KrylovCertificate<T>::append_start(Index n_starts, MatrixRef<const T> v,
                                        const Context& context) {
  const MatrixRef<T> block = MatrixRef<T>(basis_).block(0, 0, n_starts, basis_.cols());
  random_.fill(block);
  project_out<T>(block, v, context);
  orthonormalize<T>(block, random_, context);
  project_out<T>(block, v, context);
}

// Appends the inner products of the images size .. size + fresh - 1 with those before to `gram`; returns
// the largest.
template <class T>
double KrylovCertificate<T>::append_products(Index size, Index fresh, Matrix<double>& gram,
                                             const Context& context) {
  const MatrixRef<T> y = MatrixRef<T>(images_).block(size, 0, fresh, images_.cols());
  const Index total = size + fresh;
  Matrix<T> products(fresh, total);
  multiply<T>(y, Op::none, top(images_, total), Op::transpose, MatrixRef<T>(products), context);
  gram.block(size, 0, fresh, total) = products.template cast<double>();
  gram.block(0, size, total, fresh) = products.template cast<double>().transpose();
  if (!products.allFinite()) {
    throw std::domain_error("products with the tracked matrix are not finite");
  }
  return products.cwiseAbs().maxCoeff();
}

// Makes the next Krylov block, which is orthogonal to v and to the basis, orthonormal; returns its
// number of rows: directions longer than `tiny`.
template <class T>
Index KrylovCertificate<T>::orthonormalize_next(MatrixRef<T> next, Index size, MatrixRef<const T> v,
                                                double tiny, const Context& context) {
  Matrix<T> block = next.map();
  std::vector<double> lengths(static_cast<std::size_t>(next.rows));
  const Index rank =
      extend_basis<T>(next, 0, MatrixRef<T>(block), tiny, as_array(lengths), context);
  if (rank == 0) return 0;
  // Rounding along v and the basis was divided by the lengths.
  const MatrixRef<T> kept = next.block(0, 0, rank, next.cols);
  project_out<T>(kept, v, context);
  project_out<T>(kept, top(basis_, size), context);
  orthonormalize<T>(kept, random_, context);
  return rank;
}

// The leading Ritz vectors, to complete a block of j others.
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
  const Index kept = std::min(subspace_.size() - j, size);
  Matrix<T> turn(kept, size);
  for (Index i = 0; i < kept; ++i) {
    turn.row(i) = eigen.eigenvectors().col(chosen[i]).transpose().template cast<T>();
  }
  renew(ritz_vectors_, kept, basis_.cols());
  multiply<T>(view(turn), Op::none, top(basis_, size), Op::none, MatrixRef<T>(ritz_vectors_),
              context);
}

// Order of the Ritz values (given ascending) where the Krylov space closed: then few values differ from one
// that most directions share. Those above it come first, then as many of the shared one as are reported,
// then those below it, which turn together with the ones above in layers from an orthogonal start. The
// subspace grows if they do not fit.
template <class T>
std::vector<Index> KrylovCertificate<T>::choose_around_shared(const Eigen::VectorXd& values,
                                                              Index j) {
  const Index size = values.size(), k = subspace_.shape().k, p = subspace_.size();
  // The space holds as many copies of the shared value as there were starts, and one of each other.
  const double equal = 1e-9 * std::abs(values[size - 1]);
  double middle = values[size - 1];
  Index most_copies = 0;
  for (Index begin = 0; begin < size;) {
    Index end = begin + 1;
    while (end < size && values[end] - values[end - 1] <= equal) ++end;
    if (end - begin >= most_copies) {
      most_copies = end - begin;
      middle = values[begin + most_copies / 2];
    }
    begin = end;
  }
  std::vector<Index> above, shared, below;
  for (Index i = size - 1; i >= 0; --i) {
    const double apart = values[i] - middle;
    (apart > equal ? above : (apart < -equal ? below : shared)).push_back(i);
  }
  std::reverse(below.begin(), below.end());
  const Index n_above = j + static_cast<Index>(above.size());
  const Index n_shared = std::clamp<Index>(k - n_above, 0, static_cast<Index>(shared.size()));
  const Index needed = n_above + n_shared + static_cast<Index>(below.size());
  const Index most = std::min(std::max(p, thin_limit), subspace_.shape().smaller / 3);
  if (needed > p) subspace_.grow(std::min(needed, std::max(most, p)));
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
