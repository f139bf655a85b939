// SPDX-License-Identifier: MIT
// Bounds on the untracked singular values: tail_bounds, krylov_certificate and origin_bound against
// exact norms.
#include "tail_bounds.hpp"

#include <array>

#include "check.hpp"
#include "krylov_certificate.hpp"
#include "origin_bound.hpp"
#include "spectra.hpp"

using namespace dlnfast;
using check::context;
using check::distance;
using check::random_matrix;

namespace {

constexpr double unknown = -1.0;

// A block of p vectors, k of them reported, of a matrix that may change.
template <class T>
struct Fixture {
  Matrix<double> exact;
  Matrix<T> w;
  TrackerShape shape;
  Random random{1};
  SubspaceIteration<T> subspace;
  TailBounds<T> tails;
  TrackerRecord record;

  Fixture(const Matrix<double>& matrix, Index k, Index p, double tolerance = 0.05)
      : shape{matrix.rows(), matrix.cols(), std::min(matrix.rows(), matrix.cols()), k},
        subspace(shape, p, random),
        tails(subspace, tolerance) {
    set(matrix);
    record.errors.assign(static_cast<std::size_t>(k), 0.0);
    subspace.prepare(context);
  }
  void set(const Matrix<double>& matrix) {
    w = matrix.template cast<T>();
    exact = w.template cast<double>();
  }
  void sweep(Matrix<T>* image = nullptr) {
    tails.invalidate_pairs();
    subspace.sweep(MatrixOperator<T>(view(w)), image, context);
  }
  double norm_outside(Index j) const { return check::norm_outside(exact, subspace.measured(), j); }
  // Checks that every bound holds.
  void check_bounds(double squared_norm) {
    tails.find_errors(squared_norm, record, context);
    const std::vector<double> sigma = check::spectrum(exact);
    for (Index j = 0; j <= subspace.size(); ++j) CHECK(norm_outside(j) <= tails.tail(j).value);
    for (Index i = 0; i < shape.k; ++i) {
      CHECK(std::abs(sigma[i] - subspace.reported().values[i]) <= record.errors[i]);
    }
    if (shape.k < shape.smaller) CHECK(sigma[shape.k] <= record.tail);
  }
};

template <class T>
void norm_bounds_tails(Index m, Index n, Index p) {
  Fixture<T> f(check::matrix_with_values(m, n, check::geometric(std::min(m, n), 0.7)),
               std::min<Index>(p, 4), p);
  for (int round = 0; round < 4; ++round) {
    f.sweep();
    f.check_bounds(f.exact.squaredNorm());
    // Only for a large block is the Frobenius norm of the complement within the tolerance.
    const bool is_large = p >= 10 || p == f.shape.smaller;
    if (is_large && round == 3) CHECK(f.record.completeness == Completeness::rigorous);
  }
}

// Without a norm or a certificate there are no bounds, except for a block of all vectors.
void unknown_norm_gives_no_bound() {
  const Matrix<double> w = random_matrix<double>(20, 15);
  Fixture<double> part(w, 3, 6), whole(w, 3, 15);
  for (Fixture<double>* f : {&part, &whole}) {
    f->sweep();
    f->check_bounds(unknown);
  }
  CHECK(part.record.errors[0] == infinity && part.record.completeness == Completeness::none);
  CHECK(!part.tails.is_good_enough() && part.tails.largest_error() == infinity);
  CHECK(whole.record.errors[0] < 1e-12 && whole.record.completeness == Completeness::rigorous);
}

// A certified tail is transferred to other pairs of a changed matrix.
void certified_tail_is_transferred() {
  const Matrix<double> w = check::matrix_with_values(30, 25, check::geometric(25, 0.6));
  Fixture<double> f(w, 3, 6);
  for (int round = 0; round < 3; ++round) f.sweep();
  f.tails.certify({f.norm_outside(6), Completeness::probabilistic}, 6);
  f.check_bounds(unknown);
  CHECK(f.record.completeness == Completeness::probabilistic);
  Matrix<double> change = random_matrix<double>(30, 25);
  change *= 0.01 / check::spectrum(change)[0];
  for (int round = 1; round <= 5; ++round) {
    f.set(w + round * change);
    f.tails.add_drift(0.0101);
    f.sweep();
    f.check_bounds(unknown);
    CHECK(f.record.errors[0] < 0.05 && f.tails.drift() > 0.01 * round);
  }
  f.tails.add_drift(infinity);
  f.check_bounds(unknown);
  CHECK(f.record.errors[0] == infinity);
  f.tails.set_drift(0.0);
  f.tails.reset();
  f.check_bounds(unknown);
  CHECK(f.record.errors[0] == infinity);
}

// Wedin's bound against the exact sines.
void vector_error_bounds_sines() {
  const Index m = 30, n = 25, k = 3;
  const Matrix<double> u = check::random_orthonormal(m, m), v = check::random_orthonormal(n, n);
  Matrix<double> w = Matrix<double>::Zero(m, n);
  const std::vector<double> s = check::geometric(n, 0.5);
  for (Index i = 0; i < n; ++i) w += s[i] * u.col(i) * v.col(i).transpose();
  Fixture<double> f(w, k, 6);
  double last = infinity;
  for (int round = 0; round < 4; ++round) {
    f.sweep();
    f.check_bounds(w.squaredNorm());
    const SingularPairs<double>& pairs = f.subspace.reported();
    const double sine = std::hypot((pairs.left.topRows(k) * u.rightCols(m - k)).norm(),
                                   (pairs.right.topRows(k) * v.rightCols(n - k)).norm());
    const double bound = f.tails.vector_error(context);
    if (round > 0) CHECK(sine <= bound && bound <= last);
    if (round > 0) last = bound;
  }
  CHECK(last < 0.05);
}

template <class T>
void certificates_hold(const Matrix<double>& w, Index k, Index p) {
  Fixture<T> f(w, k, p);
  TrackerSettings settings;
  KrylovCertificate<T> certificate(settings, f.subspace, f.random);
  for (int round = 0; round < 2; ++round) {
    f.sweep();
    f.tails.find_errors(unknown, f.record, context);
    const Index j = f.subspace.n_separated(0.05);
    const double exact = f.norm_outside(j);
    const auto found = certificate.bound(MatrixOperator<T>(view(f.w)), j, context);
    const double rounding = check::tolerance<T>(w.cols(), 16.0);
    CHECK(found.theta <= exact + rounding && exact <= found.bound.value);
    CHECK(found.bound.kind == Completeness::probabilistic);
    CHECK(found.n_columns > 0 && certificate.count() == round + 1);
    const Matrix<T>& ritz = certificate.ritz_vectors();
    CHECK(ritz.rows() > 0 && ritz.rows() <= f.subspace.size() - j);
    CHECK_NEAR(check::departure_from_orthonormal(ritz), 0.0, rounding);
    const Matrix<T> overlap = ritz * f.subspace.measured().right.topRows(j).transpose();
    CHECK_NEAR(overlap.norm(), 0.0, rounding);
    f.tails.certify(found.bound, j);
    f.check_bounds(unknown);
  }
}

// Few different values: the space closes, the bound is sharp, and the leading directions are found.
void closed_space_gives_sharp_bound() {
  const Index d = 60, rank = 5;
  const Matrix<double> q = check::random_orthonormal(d, d);
  const Matrix<double> a = check::random_orthonormal(d, rank);
  Fixture<double> f(0.5 * q + a * a.transpose() * q, 8, 12);
  KrylovCertificate<double> certificate(TrackerSettings{}, f.subspace, f.random);
  f.sweep();
  const auto found = certificate.bound(MatrixOperator<double>(view(f.w)), 0, context);
  CHECK(certificate.is_closed() && certificate.n_above_shared() == rank);
  CHECK_NEAR(found.theta, 1.5, 1e-12);
  CHECK_NEAR(found.bound.value, 1.5, 1e-5);
  f.subspace.replace_guards(0, certificate.ritz_vectors(), context);
  f.sweep();
  for (Index i = 0; i < 8; ++i) {
    CHECK_NEAR(f.subspace.reported().values[i], i < rank ? 1.5 : 0.5, 1e-10);
  }
}

// With a limited share, sweeps add to the budget of certificates.
void sweeps_add_credit() {
  Fixture<double> f(check::matrix_with_values(40, 30, check::geometric(30, 0.9)), 2, 4);
  TrackerSettings settings;
  settings.certificate_share = 0.5;
  KrylovCertificate<double> certificate(settings, f.subspace, f.random);
  f.sweep();
  const auto found = certificate.bound(MatrixOperator<double>(view(f.w)), 0, context);
  CHECK(!certificate.is_affordable());
  certificate.add_credit(4 * found.n_columns - 1);
  CHECK(!certificate.is_affordable());
  certificate.add_credit(1);
  CHECK(certificate.is_affordable());
  certificate.add_credit(-2);
  certificate.reset_credit();
  CHECK(certificate.is_affordable());
}

// W = c W_0 + low rank: the bound is sharp if the pairs contain the low-rank part, and valid after
// they have rotated.
template <class T>
void origin_bounds_complement(bool is_scaled) {
  const Index m = 50, n = 40, p = 6;
  const double size = is_scaled ? 0x1p30 : 1.0, factor = 1.0 / size;
  const Matrix<double> initial = random_matrix<double>(m, n) / 10.0;
  const Matrix<T> origin = (size * initial).template cast<T>();
  Matrix<double> added = check::matrix_with_values(m, n, {3.0, 2.0, 1.5});
  Fixture<T> f(initial, 3, p);
  OriginBound<T> bound;
  CHECK(!bound.is_set());
  bound.set(view(origin));
  CHECK(bound.is_set());
  const MatrixRef<const T> first = view(origin);
  CHECK(std::isnan(bound.measure(&first, 0, context)) && !bound.is_compared());
  const double largest = check::spectrum(initial)[0] * (1.0 + 1e-5);
  bound.initialize(first, initial.squaredNorm(), {largest, Completeness::rigorous});
  for (std::int64_t number = 1; number < 6; ++number) {
    f.set(0.9 * initial + (1.0 + 0.1 * static_cast<double>(number)) * added);
    const Matrix<T> w = static_cast<T>(size) * f.w;
    const MatrixRef<const T> whole = view(w);
    CHECK(std::isnan(bound.measure(nullptr, number, context)) && bound.image() == nullptr);
    const double norm = bound.measure(&whole, number, context);
    CHECK(bound.is_compared() && bound.image() != nullptr);
    const double rounding = check::tolerance<T>(m, 16.0);
    CHECK_NEAR(norm * factor, f.exact.norm(), rounding * f.exact.norm());
    bound.set_unit(factor);
    f.sweep(bound.image());
    Index n_columns = 0;
    const Bound tail = bound.compare(f.subspace, f.exact.squaredNorm(), n_columns, context);
    CHECK(tail.kind == Completeness::rigorous);
    CHECK(f.norm_outside(p) <= tail.value);
    if (number > 3) CHECK(tail.value < 2.0 * f.norm_outside(p));
    CHECK(n_columns <= 2 * p && (number > 1 || n_columns == 2 * p));
    f.tails.certify(tail, p);
    f.check_bounds(f.exact.squaredNorm());
  }
  // After comparisons without success, the next one is 1, then 3 updates later. `reset` ends all
  // comparisons.
  const MatrixRef<const T> same = view(origin);
  bound.schedule(false, 6);
  bound.measure(&same, 6, context);
  CHECK(!bound.is_compared());
  bound.measure(&same, 7, context);
  CHECK(bound.is_compared());
  bound.schedule(false, 7);
  bound.measure(&same, 9, context);
  CHECK(!bound.is_compared());
  bound.schedule(true, 9);
  bound.measure(&same, 9, context);
  CHECK(bound.is_compared());
  bound.reset();
  CHECK(!bound.is_compared());
  bound.measure(&same, 10, context);
  CHECK(!bound.is_compared());
}

// If the first matrix is not W_0, there is no bound.
void other_first_matrix_gives_no_bound() {
  const Matrix<double> origin = random_matrix<double>(9, 8), other = random_matrix<double>(9, 8);
  const Matrix<double> copy = origin;
  for (const Matrix<double>* w : {&other, &copy}) {
    OriginBound<double> bound;
    bound.set(view(origin));
    bound.initialize(view(*w), w->squaredNorm(), {w->norm(), Completeness::rigorous});
    const MatrixRef<const double> next = view(other);
    bound.measure(&next, 1, context);
    CHECK(bound.is_compared() == (w == &copy));
  }
}

}  // namespace

int main() {
  for (const auto& [m, n, p] : std::vector<std::array<Index, 3>>{
           {1, 1, 1}, {8, 5, 3}, {5, 8, 5}, {40, 30, 10}, {30, 45, 12}}) {
    norm_bounds_tails<double>(m, n, p);
    norm_bounds_tails<float>(m, n, p);
  }
  unknown_norm_gives_no_bound();
  certified_tail_is_transferred();
  vector_error_bounds_sines();
  for (const double ratio : {0.6, 0.95, 1.0}) {
    const Matrix<double> w = check::matrix_with_values(70, 50, check::geometric(50, ratio));
    certificates_hold<double>(w, 4, 8);
    certificates_hold<float>(w, 4, 8);
    certificates_hold<double>(w.transpose(), 4, 8);
  }
  certificates_hold<double>(check::matrix_with_values(9, 6, check::geometric(6, 0.5)), 2, 3);
  closed_space_gives_sharp_bound();
  sweeps_add_credit();
  for (const bool is_scaled : {false, true}) {
    origin_bounds_complement<double>(is_scaled);
    origin_bounds_complement<float>(is_scaled);
  }
  other_first_matrix_gives_no_bound();
  return check::result();
}
