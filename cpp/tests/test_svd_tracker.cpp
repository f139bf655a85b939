// SPDX-License-Identifier: MIT
#include "dlnfast/svd_tracker.hpp"

#include <Eigen/SVD>
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::random_orthonormal;

namespace {

const Context context{1, nullptr};
constexpr double unknown = std::numeric_limits<double>::infinity();

template <class T>
MatrixRef<const T> ref(const Matrix<T>& m) {
  return {m.data(), m.rows(), m.cols()};
}

std::vector<double> exact_values(const Matrix<double>& w) {
  const Eigen::BDCSVD<Eigen::MatrixXd> svd(w);
  return {svd.singularValues().data(), svd.singularValues().data() + svd.singularValues().size()};
}

// Checks that every value of the last record is within its bound, and that the vectors belong to
// the values.
template <class T>
void check_record(const SvdTracker<T>& tracker, const Matrix<T>& w) {
  const TrackerRecord& r = tracker.record();
  const Matrix<double> exact = w.template cast<double>();
  const std::vector<double> sigma = exact_values(exact);
  const Index k = tracker.n_values();
  CHECK(static_cast<Index>(r.values.size()) == k);
  for (Index i = 0; i < k; ++i) {
    CHECK(std::abs(r.values[i] - sigma[i]) <= r.errors[i]);
    if (i > 0) CHECK(r.values[i] <= r.values[i - 1]);
  }
  const double rounding = check::tolerance<T>(std::max(w.rows(), w.cols()), 16.0);
  if (static_cast<Index>(sigma.size()) > k) CHECK(sigma[k] <= r.tail + rounding * sigma[0]);
  if (tracker.left().absent()) return;
  const Matrix<double> u = tracker.left().map().template cast<double>();
  const Matrix<double> v = tracker.right().map().template cast<double>();
  const Matrix<double> unit = Matrix<double>::Identity(k, k);
  CHECK_NEAR(distance(Matrix<double>(u * u.transpose()), unit), 0.0, rounding);
  CHECK_NEAR(distance(Matrix<double>(v * v.transpose()), unit), 0.0, rounding);
  // Exact in one direction: W^T u = s v.
  for (Index i = 0; i < k; ++i) {
    const double s = r.values[i] * r.signs[i];
    CHECK_NEAR((u.row(i) * exact - s * v.row(i)).norm(), 0.0, rounding * (sigma[0] + 1e-300));
  }
}

// Returns U diag(s) V^T.
Matrix<double> with_values(const Matrix<double>& u, const std::vector<double>& s,
                           const Matrix<double>& v) {
  Matrix<double> w = Matrix<double>::Zero(u.rows(), v.rows());
  for (std::size_t i = 0; i < s.size(); ++i) {
    const Index j = static_cast<Index>(i);
    w += s[i] * u.col(j) * v.col(j).transpose();
  }
  return w;
}

template <class T>
void check_drift(Index m, Index n, Index k, TrackerMode mode, bool known) {
  TrackerSettings settings;
  settings.n_values = k;
  settings.mode = mode;
  SvdTracker<T> tracker(m, n, settings);
  Matrix<T> w = random_matrix<T>(m, n) / std::sqrt(static_cast<T>(std::max(m, n)));
  for (int update = 0; update < 12; ++update) {
    tracker.update(ref(w), known && update > 0 ? 0.05 : unknown, context);
    check_record(tracker, w);
    // A change of norm 0.05 at most.
    Matrix<T> step = random_matrix<T>(m, 2) * random_matrix<T>(2, n);
    w += step * static_cast<T>(0.049 / std::max(step.norm(), T(1e-30)));
  }
}

template <class T>
void follows_drifts_of_all_shapes() {
  for (const TrackerMode mode : {TrackerMode::automatic, TrackerMode::dense, TrackerMode::full}) {
    for (const bool known : {false, true}) {
      for (const auto& [m, n] : std::vector<std::pair<Index, Index>>{
               {1, 1}, {1, 7}, {7, 1}, {2, 3}, {13, 13}, {31, 17}, {17, 40}, {64, 64}}) {
        for (const Index k : {1, 3, 8, 100}) check_drift<T>(m, n, k, mode, known);
      }
    }
  }
  check_drift<T>(150, 211, 5, TrackerMode::automatic, true);
  check_drift<T>(211, 150, 5, TrackerMode::automatic, false);
}

// A scaled isometry plus a growing low-rank matrix, as a network from an orthogonal start. The
// values of the cluster have sharp bounds, because the certificate finds few different values. From the matrix
// itself they are rigorous.
void cluster_values_are_sharp(bool is_operator) {
  const Index d = 160, r = 6, k = 12;
  const Matrix<double> q = random_orthonormal(d, d);
  const Matrix<double> a = random_orthonormal(d, r), b = q.transpose() * random_orthonormal(d, r);
  TrackerSettings settings;
  settings.n_values = k;
  settings.tolerance = 1e-7;
  SvdTracker<double> tracker(d, d, settings);
  for (int update = 0; update < 30; ++update) {
    Matrix<double> w = 0.5 * q;
    const double grown = 0.02 * update;
    for (Index i = 0; i < r; ++i) {
      w += grown * (1.0 + 0.1 * static_cast<double>(i)) * a.col(i) * b.col(i).transpose();
    }
    if (is_operator) {
      tracker.update(MatrixOperator<double>(ref(w)), unknown, context);
    } else {
      tracker.update(ref(w), unknown, context);
    }
    check_record(tracker, w);
    const TrackerRecord& record = tracker.record();
    CHECK(record.completeness ==
          (is_operator ? Completeness::probabilistic : Completeness::rigorous));
    for (Index i = 0; i < k; ++i) CHECK(record.errors[i] < 1e-6);
  }
}

// Zero, exact rank deficiency, equal values.
void degenerate_matrices_are_tracked() {
  const Index d = 140;
  const Matrix<double> u = random_orthonormal(d, d), v = random_orthonormal(d, d);
  for (const std::vector<double>& s : {std::vector<double>{}, std::vector<double>{2.0},
                                       std::vector<double>{3.0, 3.0, 3.0, 1.0, 1.0},
                                       std::vector<double>(static_cast<std::size_t>(d), 0.7),
                                       std::vector<double>{1.0, 1e-9, 1e-18, 1e-200}}) {
    const Matrix<double> w = with_values(u, s, v);
    for (const Index k : {1, 4, 10}) {
      TrackerSettings settings;
      settings.n_values = k;
      SvdTracker<double> tracker(d, d, settings);
      for (int update = 0; update < 4; ++update) {
        tracker.update(ref(w), update == 0 ? unknown : 0.0, context);
        check_record(tracker, w);
        CHECK(tracker.record().completeness != Completeness::none);
        for (Index i = 0; i < k; ++i) CHECK(tracker.record().errors[i] < 1e-6);
      }
    }
  }
  // From zero to a nonzero matrix and back.
  TrackerSettings settings;
  settings.n_values = 3;
  SvdTracker<double> tracker(d, d, settings);
  const Matrix<double> zero = Matrix<double>::Zero(d, d),
                       w = with_values(u, {2.0, 1.0, 0.5, 0.1}, v);
  for (const Matrix<double>* now : {&zero, &w, &zero, &w}) {
    tracker.update(ref(*now), 2.0, context);
    check_record(tracker, *now);
  }
}

// Two values cross; their branches keep their numbers, and no vector changes its sign.
void branches_keep_their_ids_at_crossings() {
  const Index d = 150;
  for (const Index m : {d, Index(40)}) {  // dense and full tier
    const Matrix<double> u = random_orthonormal(m, m), v = random_orthonormal(d, m);
    TrackerSettings settings;
    settings.n_values = 4;
    SvdTracker<double> tracker(m, d, settings);
    Matrix<double> last_left;
    std::int64_t first = -1, second = -1;
    for (int update = 0; update <= 40; ++update) {
      const double t = 0.05 * (update - 20);
      const Matrix<double> w = with_values(u, {5.0, 3.0 + t, 3.0 - t, 1.0, 0.5, 0.4}, v);
      const TrackerRecord& r = tracker.update(ref(w), update == 0 ? unknown : 0.11, context);
      check_record(tracker, w);
      const Matrix<double> left = tracker.left().map();
      // The tracked vector nearest to u_1, and to u_2.
      Index at = 0;
      (left * u.col(1)).cwiseAbs().maxCoeff(&at);
      Index other = 0;
      (left * u.col(2)).cwiseAbs().maxCoeff(&other);
      if (update == 0) {
        first = r.branches[at];
        second = r.branches[other];
        CHECK(at == 2 && other == 1);
      }
      CHECK(r.branches[at] == first);
      CHECK(r.branches[other] == second);
      if (update == 40) CHECK(at == 1 && other == 2);
      if (update > 0) {
        for (Index i = 0; i < 4; ++i) {
          for (Index j = 0; j < 4; ++j) CHECK(left.row(i).dot(last_left.row(j)) > -0.5);
        }
      }
      last_left = left;
    }
    CHECK(*std::max_element(tracker.record().branches.begin(), tracker.record().branches.end()) <
          4 + 8);
  }
}

// A value passes through zero: afterwards its analytic branch is negative, and its vectors are
// continuous.
void signed_branches_pass_zero() {
  const Index m = 30;
  const Matrix<double> u = random_orthonormal(m, m), v = random_orthonormal(m, m);
  TrackerSettings settings;
  settings.n_values = 3;
  settings.branches.signed_values = true;
  SvdTracker<double> tracker(m, m, settings);
  for (int update = 0; update <= 20; ++update) {
    const double t = 0.05 * (10.5 - update);
    const Matrix<double> w = with_values(u, {3.0, 2.0, t}, v);
    const TrackerRecord& r = tracker.update(ref(w), unknown, context);
    check_record(tracker, w);
    CHECK_NEAR(r.signs[2] * r.values[2], t, 1e-12);
    CHECK(r.branches[2] == 2);
  }
}

void nonfinite_gains_are_rejected() {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {infinity, std::nan("")}) {
    CHECK_THROWS(best_assignment({std::vector<double>(6, bad).data(), 2, 3}), std::domain_error);
  }
}

void assignment_is_optimal() {
  for (int trial = 0; trial < 200; ++trial) {
    const Index m = 1 + check::pick(5), n = 1 + check::pick(5);
    std::vector<double> gain(static_cast<std::size_t>(m * n));
    for (double& g : gain) g = std::abs(check::uniform());
    const std::vector<Index> chosen = best_assignment({gain.data(), m, n});
    double total = 0.0;
    Index n_chosen = 0;
    std::vector<int> used(static_cast<std::size_t>(n), 0);
    for (Index i = 0; i < m; ++i) {
      if (chosen[i] < 0) continue;
      ++n_chosen;
      CHECK(++used[chosen[i]] == 1);
      total += gain[i * n + chosen[i]];
    }
    CHECK(n_chosen == std::min(m, n));
    // Compare with all permutations of the larger side.
    std::vector<Index> order(static_cast<std::size_t>(std::max(m, n)));
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
    double best = 0.0;
    do {
      double sum = 0.0;
      for (Index i = 0; i < std::min(m, n); ++i) {
        sum += m <= n ? gain[i * n + order[i]] : gain[order[i] * n + i];
      }
      best = std::max(best, sum);
    } while (std::next_permutation(order.begin(), order.end()));
    CHECK_NEAR(total, best, 1e-12);
  }
}

// The factored form against the full matrix: values, vectors, all of them at once.
template <class T>
void check_factored(Index m, Index n, bool momentum) {
  const Matrix<T> initial = (0.3 * random_orthonormal(m, n)).template cast<T>();
  const Isometry isometry = measure_isometry<T>(ref(initial), context);
  const double tiny = check::tolerance<T>(std::max(m, n), 64.0);
  CHECK_NEAR(isometry.scale, 0.3, tiny);
  CHECK(isometry.departure < tiny && isometry.rigorous);
  const Isometry estimated = measure_isometry<T>(ref(initial), context, 1);
  CHECK(estimated.departure < 1e3 * tiny);
  CHECK(estimated.rigorous == (std::min(m, n) <= 1));

  const Index limit = std::min(m, n);
  LowRankDrift<T> drift(ref(initial), isometry, limit);
  Matrix<double> w = initial.template cast<double>(), velocity = Matrix<double>::Zero(m, n);
  TrackerSettings settings;
  settings.n_values = 5;
  SvdTracker<T> tracker(m, n, settings);
  settings.n_values = std::min(m, n);
  settings.n_guards = 0;
  settings.follow = false;
  SvdTracker<T> all(m, n, settings);
  const Matrix<T> left = random_matrix<T>(2, m), right = random_matrix<T>(2, n);
  const double mu = momentum ? 0.8 : 0.0;
  for (int update = 0; update < 10; ++update) {
    for (int step = 0; step < 3; ++step) {
      const Matrix<T> l = random_matrix<T>(2, 2) * left, r = random_matrix<T>(2, 2) * right;
      drift.descend(0.5, 0.02, 0.3, mu, ref(l), ref(r), context);
      velocity = mu * velocity + 0.3 * w +
                 0.5 * l.template cast<double>().transpose() * r.template cast<double>();
      w -= 0.02 * velocity;
    }
    CHECK(drift.flush(context));
    const Matrix<T> now = w.template cast<T>();
    tracker.update(drift, context);
    CHECK(tracker.record().tier == Tier::factored);
    check_record(tracker, now);
    all.update(drift, context);
    check_record(all, now);
    CHECK_NEAR(all.record().errors[0], 0.0, 100.0 * tiny);
  }
}

// Frames that do not close are reported.
void too_small_frames_are_reported() {
  const Index d = 50;
  const Matrix<double> initial = random_orthonormal(d, d);
  const Isometry isometry = measure_isometry<double>(ref(initial), context);
  LowRankDrift<double> drift(ref(initial), isometry, 7);
  const Matrix<double> left = random_matrix<double>(4, d), right = random_matrix<double>(4, d);
  drift.update(1.0, 0.1, ref(left), ref(right), context);
  CHECK(!drift.flush(context));
  CHECK(!drift.is_closed());
  TrackerSettings settings;
  SvdTracker<double> tracker(d, d, settings);
  CHECK_THROWS(tracker.update(drift, context), std::invalid_argument);
}

// A value that appears outside the tracked vectors in an update of another tier is bounded
// afterwards: the certificate of an earlier matrix is not used any more.
void certificates_expire_with_the_tier() {
  const Index d = 100, k = 3;
  std::vector<double> s(static_cast<std::size_t>(d), 0.01);
  std::copy_n(std::vector<double>{3.0, 2.0, 1.0, 0.5, 0.4}.begin(), 5, s.begin());
  const Matrix<double> u = random_orthonormal(d, d), v = random_orthonormal(d, d);
  const Matrix<double> first = with_values(u, s, v);
  s[50] = 5.0;
  const Matrix<double> second = with_values(u, s, v);
  TrackerSettings settings;
  settings.n_values = k;
  settings.n_guards = 2;
  SvdTracker<double> tracker(d, d, settings);
  for (int update = 0; update < 2; ++update) {
    tracker.update(MatrixOperator<double>(ref(first)), update == 0 ? unknown : 0.0, context);
    check_record(tracker, first);
    CHECK(tracker.record().tier == Tier::dense);
  }
  tracker.update(ref(second), unknown, context);
  CHECK(tracker.record().tier == Tier::full);
  const Matrix<double> start = v.leftCols(5).transpose();
  tracker.seed(ref(start), context);
  tracker.update(MatrixOperator<double>(ref(second)), 0.0, context);
  CHECK(tracker.record().tier == Tier::dense);
  check_record(tracker, second);

  // The same with an update in factored form.
  const Matrix<double> large = random_orthonormal(200, 200);
  SvdTracker<double> factored(200, 200, settings);
  factored.update(ref(large), unknown, context);
  LowRankDrift<double> drift(ref(large), measure_isometry<double>(ref(large), context), 64);
  const Matrix<double> left = random_matrix<double>(1, 200);
  const Matrix<double> right = left * large;
  const double added = 4.0 / left.squaredNorm();
  drift.update(1.0, added, ref(left), ref(right), context);
  CHECK(drift.flush(context));
  factored.update(drift, context);
  CHECK(factored.record().tier == Tier::factored);
  const Matrix<double> next = large + added * left.transpose() * right;
  Matrix<double> others = random_matrix<double>(6, 200);
  others -= (others * right.transpose()) * right / right.squaredNorm();
  factored.seed(ref(others), context);
  factored.update(ref(next), 0.0, context);
  CHECK(factored.record().tier == Tier::dense);
  check_record(factored, next);
}

void input_is_checked() {
  TrackerSettings settings;
  CHECK_THROWS(SvdTracker<double>(0, 3, settings), ShapeError);
  CHECK_THROWS(SvdTracker<double>(3, 0, settings), ShapeError);
  SvdTracker<double> tracker(6, 5, settings);
  Matrix<double> w = random_matrix<double>(5, 6);
  CHECK_THROWS(tracker.update(ref(w), 0.0, context), ShapeError);
  w = random_matrix<double>(6, 5);
  w(2, 3) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS(tracker.update(ref(w), 0.0, context), std::domain_error);
  w(2, 3) = 0.0;
  tracker.update(ref(w), 0.0, context);
  check_record(tracker, w);
  settings.n_values = 0;
  CHECK_THROWS(SvdTracker<double>(6, 5, settings), ShapeError);
}

}  // namespace

int main() {
  assignment_is_optimal();
  nonfinite_gains_are_rejected();
  follows_drifts_of_all_shapes<double>();
  follows_drifts_of_all_shapes<float>();
  cluster_values_are_sharp(true);
  cluster_values_are_sharp(false);
  degenerate_matrices_are_tracked();
  branches_keep_their_ids_at_crossings();
  signed_branches_pass_zero();
  for (const bool momentum : {false, true}) {
    for (const auto& [m, n] :
         std::vector<std::pair<Index, Index>>{{40, 40}, {60, 35}, {35, 60}, {200, 170}}) {
      check_factored<double>(m, n, momentum);
      check_factored<float>(m, n, momentum);
    }
  }
  too_small_frames_are_reported();
  certificates_expire_with_the_tier();
  input_is_checked();
  return check::result();
}
