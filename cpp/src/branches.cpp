// SPDX-License-Identifier: MIT
#include "dlnfast/branches.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/safe_resize.hpp"
#include "dlnfast/singular_values.hpp"
#include "numbers.hpp"
#include "views.hpp"

namespace dlnfast {
namespace {

// Largest number of unmatched vectors for which the optimal assignment is computed; above it a
// greedy one.
constexpr Index assignment_limit = 256;
// Smaller overlaps do not identify a branch.
constexpr double least_overlap = 0.1;

// Products use multiply(), because each product expression of Eigen takes seconds to compile.

// Replaces the rows from `begin` on by `rotation` times them.
template <class T>
void rotate_rows(MatrixRef<T> block, Index begin, const Matrix<T>& rotation,
                 const Context& context) {
  const MatrixRef<T> rows = block.block(begin, 0, rotation.rows(), block.cols);
  const Matrix<T> old = rows.map();
  multiply<T>(view(rotation), Op::none, view(old), Op::none, rows, context);
}

template <class T>
double angle(const Eigen::Ref<const Eigen::Matrix<T, 1, Eigen::Dynamic>>& x,
             const Eigen::Ref<const Eigen::Matrix<T, 1, Eigen::Dynamic>>& y) {
  const T sign = x.dot(y) < T(0) ? T(-1) : T(1);
  const double difference = static_cast<double>((x - sign * y).norm());
  const double sum = static_cast<double>((x + sign * y).norm());
  return 2.0 * std::atan2(difference, sum);
}

}  // namespace

std::vector<std::int64_t> find_clusters(const std::vector<double>& values,
                                        const std::vector<double>& errors, double tolerance) {
  std::vector<std::int64_t> clusters(values.size(), 0);
  for (std::size_t i = 1; i < values.size(); ++i) {
    const double gap = values[i - 1] - values[i];
    const double error = 4.0 * std::max(errors[i - 1], errors[i]);
    clusters[i] = clusters[i - 1] + (gap > std::max(error, tolerance * values[0]) ? 1 : 0);
  }
  return clusters;
}

std::vector<Index> best_assignment(MatrixRef<const double> gain) {
  const Index n_rows = gain.rows, n_cols = gain.cols;
  // Shortest augmenting paths on a square cost matrix, padded with zeros; potentials u, v.
  const Index n = std::max(n_rows, n_cols);
  const auto cost = [&](Index i, Index j) {
    return i < n_rows && j < n_cols ? -gain.row(i)[j] : 0.0;
  };
  const auto size = static_cast<std::size_t>(n) + 1;
  std::vector<double> u(size, 0.0), v(size, 0.0), shortest(size);
  std::vector<Index> row_of(size, 0), before(size, 0);  // index 0: none
  std::vector<char> done(size);
  for (Index i = 1; i <= n; ++i) {
    row_of[0] = i;
    Index column = 0;
    std::fill(shortest.begin(), shortest.end(), infinity);
    std::fill(done.begin(), done.end(), 0);
    do {
      done[column] = 1;
      const Index row = row_of[column];
      double step = infinity;
      Index next = 0;
      for (Index j = 1; j <= n; ++j) {
        if (done[j]) continue;
        const double reduced = cost(row - 1, j - 1) - u[row] - v[j];
        if (reduced < shortest[j]) {
          shortest[j] = reduced;
          before[j] = column;
        }
        if (shortest[j] < step) {
          step = shortest[j];
          next = j;
        }
      }
      if (next == 0) throw std::domain_error("the gains of an assignment are not finite");
      for (Index j = 0; j <= n; ++j) {
        if (done[j]) {
          u[row_of[j]] += step;
          v[j] -= step;
        } else {
          shortest[j] -= step;
        }
      }
      column = next;
    } while (row_of[column] != 0);
    while (column != 0) {
      row_of[column] = row_of[before[column]];
      column = before[column];
    }
  }
  std::vector<Index> column_of(static_cast<std::size_t>(n_rows), -1);
  for (Index j = 1; j <= n_cols; ++j) {
    if (row_of[j] >= 1 && row_of[j] <= n_rows) column_of[row_of[j] - 1] = j - 1;
  }
  return column_of;
}

template <class T>
Branches<T>::Branches(const BranchSettings& settings) : settings_(settings) {}

template <class T>
Branches<T>::~Branches() = default;

template <class T>
void Branches<T>::continue_from(const Branches<double>& other, MatrixRef<const T> left,
                                MatrixRef<const T> right) {
  left_ = left.map();
  right_ = right.map();
  values_ = other.values();
  ids_ = other.ids();
  next_id_ = other.n_branches();
}

template <class T>
void Branches<T>::align_groups(const std::vector<double>& values, MatrixRef<T> left,
                               MatrixRef<T> right, Matrix<T>& left_overlap,
                               Matrix<T>& right_overlap, const Context& context) {
  // Only values that are equal to rounding: the vectors of all other values are unique up to sign.
  const double equal = 1024.0 * epsilon<T>() * values[0];
  const Index p = left.rows;
  const Index n_before = left_overlap.cols();
  for (Index begin = 0; begin < p;) {
    Index end = begin + 1;
    while (end < p && values[end - 1] - values[end] <= equal) ++end;
    const Index size = std::min(end - begin, n_before);
    if (end - begin > 1 && size == end - begin) {
      // The previous vectors with the largest components in the span of this group.
      std::vector<std::pair<double, Index>> weight(static_cast<std::size_t>(n_before));
      for (Index j = 0; j < n_before; ++j) {
        const auto u = left_overlap.col(j).segment(begin, size);
        const auto v = right_overlap.col(j).segment(begin, size);
        weight[j] = {-static_cast<double>(u.squaredNorm() + v.squaredNorm()), j};
      }
      std::sort(weight.begin(), weight.end());
      std::vector<Index> chosen;
      for (Index j = 0; j < size; ++j) chosen.push_back(weight[j].second);
      std::sort(chosen.begin(), chosen.end());
      Matrix<double> common(size, size);
      for (Index j = 0; j < size; ++j) {
        common.col(j) = (left_overlap.col(chosen[j]).segment(begin, size) +
                         right_overlap.col(chosen[j]).segment(begin, size))
                            .template cast<double>();
      }
      Matrix<double> s(1, size), a(size, size), b(size, size);
      singular_values<double>(MatrixRef<double>(common), MatrixRef<double>(s), MatrixRef<double>(a),
                              MatrixRef<double>(b), context);
      multiply<double>(view(b), Op::none, view(a), Op::transpose, MatrixRef<double>(common),
                       context);
      const Matrix<T> rotation = common.template cast<T>();
      for (MatrixRef<T> rows :
           {left, right, MatrixRef<T>(left_overlap), MatrixRef<T>(right_overlap)})
        rotate_rows<T>(rows, begin, rotation, context);
    }
    begin = end;
  }
}

template <class T>
void Branches<T>::match(const std::vector<double>& values, double max_distance,
                        const Matrix<T>& left_overlap, const Matrix<T>& right_overlap) {
  const Index p = left_overlap.rows();
  const Index n_before = left_overlap.cols();
  const auto overlap = [&](Index i, Index j) {
    return std::abs(static_cast<double>(left_overlap(i, j)) *
                    static_cast<double>(right_overlap(i, j)));
  };
  partner_.assign(static_cast<std::size_t>(p), -1);
  std::vector<char> is_matched(static_cast<std::size_t>(n_before), 0);
  std::vector<Index> unmatched;
  for (Index i = 0; i < p; ++i) {
    for (Index j = 0; j < n_before; ++j) {
      if (overlap(i, j) > 0.5 && !is_matched[j]) {
        partner_[i] = j;
        is_matched[j] = 1;
        break;
      }
    }
    if (partner_[i] < 0) unmatched.push_back(i);
  }
  std::vector<Index> candidates;
  for (Index j = 0; j < n_before; ++j) {
    if (!is_matched[j]) candidates.push_back(j);
  }
  if (!unmatched.empty() && !candidates.empty()) {
    const auto gain = [&](Index i, Index j) {
      const double o = overlap(i, j);
      return o >= least_overlap && std::abs(values[i] - values_[j]) <= max_distance ? o : 0.0;
    };
    const Index n_unmatched = static_cast<Index>(unmatched.size());
    const Index n_candidates = static_cast<Index>(candidates.size());
    if (std::max(n_unmatched, n_candidates) <= assignment_limit) {
      std::vector<double> gains;
      for (const Index i : unmatched) {
        for (const Index j : candidates) gains.push_back(gain(i, j));
      }
      const std::vector<Index> chosen = best_assignment({gains.data(), n_unmatched, n_candidates});
      for (Index r = 0; r < n_unmatched; ++r) {
        if (chosen[r] >= 0 && gains[r * n_candidates + chosen[r]] > 0.0) {
          partner_[unmatched[r]] = candidates[chosen[r]];
        }
      }
    } else {
      for (const Index i : unmatched) {
        Index best = -1;
        for (const Index j : candidates) {
          if (!is_matched[j] && gain(i, j) > (best < 0 ? 0.0 : gain(i, best))) best = j;
        }
        if (best < 0) continue;
        partner_[i] = best;
        is_matched[best] = 1;
      }
    }
  }
  std::vector<std::int64_t> ids(static_cast<std::size_t>(p));
  overlaps_.assign(static_cast<std::size_t>(p), 0.0);
  for (Index i = 0; i < p; ++i) {
    ids[i] = partner_[i] < 0 ? next_id_++ : ids_[partner_[i]];
    if (partner_[i] >= 0) overlaps_[i] = overlap(i, partner_[i]);
  }
  ids_ = std::move(ids);
}

template <class T>
void Branches<T>::follow(const std::vector<double>& values, const std::vector<double>& errors,
                         double max_distance, MatrixRef<T> left, MatrixRef<T> right,
                         const Context& context) {
  const Index p = left.rows;
  require_length(static_cast<Index>(values.size()), p, "values");
  require_length(static_cast<Index>(errors.size()), p, "errors");
  require_shape(right, p, right.cols, "right vectors");
  clusters_ = find_clusters(values, errors, settings_.cluster_tolerance);
  signs_.assign(static_cast<std::size_t>(p), 1.0);
  if (left_.rows() == 0) {
    ids_.resize(static_cast<std::size_t>(p));
    std::iota(ids_.begin(), ids_.end(), next_id_);
    next_id_ += p;
    overlaps_.assign(static_cast<std::size_t>(p), 1.0);
  } else {
    require_shape(left, p, left_.cols(), "left vectors");
    require_shape(right, p, right_.cols(), "right vectors");
    Matrix<T> left_overlap(p, left_.rows()), right_overlap(p, right_.rows());
    multiply<T>(left, Op::none, MatrixRef<T>(left_), Op::transpose, MatrixRef<T>(left_overlap),
                context);
    multiply<T>(right, Op::none, MatrixRef<T>(right_), Op::transpose, MatrixRef<T>(right_overlap),
                context);
    align_groups(values, left, right, left_overlap, right_overlap, context);
    match(values, max_distance, left_overlap, right_overlap);
    for (Index i = 0; i < p; ++i) {
      const Index j = partner_[i];
      if (j < 0) continue;
      const T du = left_overlap(i, j);
      const T dv = right_overlap(i, j);
      const bool agree = (du < T(0)) == (dv < T(0));
      if (settings_.signed_values) {
        if (du < T(0)) left.map().row(i) *= T(-1);
        if (dv < T(0)) right.map().row(i) *= T(-1);
        if (!agree) signs_[i] = -1.0;
      } else if ((std::abs(du) >= std::abs(dv) ? du : dv) < T(0)) {
        left.map().row(i) *= T(-1);
        right.map().row(i) *= T(-1);
      }
    }
  }
  values_ = values;
  safe_assign_both(left_, left.map(), right_, right.map());
}

template <class T>
void Branches<T>::set_reference() {
  safe_assign_both(reference_left_, left_, reference_right_, right_);
  reference_ids_ = ids_;
  has_reference_ = true;
  has_external_reference_ = false;
}

template <class T>
void Branches<T>::set_reference(MatrixRef<const T> left, MatrixRef<const T> right) {
  require_shape(right, left.rows, right.cols, "the reference's right vectors");
  safe_assign_both(reference_left_, left.map(), reference_right_, right.map());
  has_reference_ = true;
  has_external_reference_ = true;
}

template <class T>
std::vector<double> Branches<T>::angles(bool left) const {
  const Matrix<T>& current = left ? left_ : right_;
  const Matrix<T>& reference = left ? reference_left_ : reference_right_;
  std::vector<double> result(static_cast<std::size_t>(current.rows()), nan);
  if (!has_reference_ || current.cols() != reference.cols()) return result;
  for (Index i = 0; i < current.rows(); ++i) {
    Index j = i;
    if (!has_external_reference_) {
      const auto found = std::find(reference_ids_.begin(), reference_ids_.end(), ids_[i]);
      j = found == reference_ids_.end() ? reference.rows() : found - reference_ids_.begin();
    }
    if (j < reference.rows()) result[i] = angle<T>(current.row(i), reference.row(j));
  }
  return result;
}

template <class T>
BlockAngle Branches<T>::block_angle(bool left, Index k, const Context& context) const {
  const Matrix<T>& current = left ? left_ : right_;
  const Matrix<T>& reference = left ? reference_left_ : reference_right_;
  k = std::min({k, static_cast<Index>(current.rows()), static_cast<Index>(reference.rows())});
  if (!has_reference_ || current.cols() != reference.cols() || k == 0) return {nan, nan};
  // Sines, from the part of the reference outside the span: cosines would lose half of the digits.
  const MatrixRef<const T> span{current.data(), k, current.cols()};
  Matrix<T> outside = reference.topRows(k), product(k, k);
  multiply<T>(view(outside), Op::none, span, Op::transpose, MatrixRef<T>(product), context);
  multiply<T>(T(-1), view(product), Op::none, span, Op::none, T(1), MatrixRef<T>(outside), context);
  multiply<T>(view(outside), Op::none, view(outside), Op::transpose, MatrixRef<T>(product),
              context);
  const Matrix<double> gram = product.template cast<double>();
  Matrix<double> s(1, k);
  singular_values<double>(MatrixRef<const double>{gram.data(), k, k}, MatrixRef<double>(s), {}, {},
                          context);
  return {std::asin(std::min(1.0, std::sqrt(s(0, 0)))),
          std::sqrt(std::max(0.0, gram.diagonal().sum()))};
}

void follow_branches(ArrayRef<const double, 2> values, ArrayRef<double, 3> left,
                     ArrayRef<double, 3> right, double error, double cluster_tolerance,
                     ArrayRef<std::int64_t, 2> ids, ArrayRef<std::int64_t, 2> clusters,
                     const Context& context) {
  const auto [n, p] = values.shape;
  const Index a = left.shape[2], b = right.shape[2];
  require_room(left, n, {p, a}, "left");
  require_room(right, n, {p, b}, "right");
  require_room(ids, n, {p}, "ids");
  require_room(clusters, n, {p}, "clusters");
  BranchSettings settings;
  settings.cluster_tolerance = cluster_tolerance;
  Branches<double> branches(settings);
  const std::vector<double> errors(static_cast<std::size_t>(p), error);
  for (Index i = 0; i < n; ++i) {
    const double* row = values.data + i * p;
    branches.follow(std::vector<double>(row, row + p), errors, infinity,
                    {left.data + i * p * a, p, a}, {right.data + i * p * b, p, b}, context);
    std::copy(branches.ids().begin(), branches.ids().end(), ids.data + i * p);
    std::copy(branches.clusters().begin(), branches.clusters().end(), clusters.data + i * p);
  }
}

template class Branches<float>;
template class Branches<double>;

}  // namespace dlnfast
