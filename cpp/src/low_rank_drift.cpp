// SPDX-License-Identifier: MIT
#include "dlnfast/low_rank_drift.hpp"

#include <algorithm>
#include <cmath>
#include <string>

#include "dlnfast/basis.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/safe_resize.hpp"
#include "numbers.hpp"

namespace dlnfast {
namespace {

// Number of update rows that are collected before they are added to the frames.
constexpr Index max_pending = 64;

// Largest length of the part of a unit vector outside the frames that may be rounding error.
template <class T>
double outside_tolerance(Index size) {
  return 64.0 * epsilon<T>() * std::sqrt(static_cast<double>(size));
}

// Whether squares and products of frames neither overflow nor lose digits, for a W of this size.
template <class T>
bool fits_frames(double size) {
  constexpr double largest = sizeof(T) == 8 ? 1e100 : 1e28;
  return size >= 1.0 / largest && size <= largest;
}

// Called before any change of state.
template <class T>
void require_blocks(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<const T> initial) {
  require_shape(left, left.rows, initial.rows, "the left block of an update");
  require_shape(right, left.rows, initial.cols, "the right block of an update");
}

}  // namespace

template <class T>
Isometry measure_isometry(MatrixRef<const T> w, const Context& context, Index exact_limit) {
  Isometry result;
  const Index n = std::min(w.rows, w.cols);
  if (n == 0) return result;
  result.scale = norm<T>(w, context) / std::sqrt(static_cast<double>(n));
  result.departure = infinity;
  if (!fits_frames<T>(result.scale)) return result;
  // `unit` scales products with W and W^T so that neither is far from 1.
  int exponent = 0;
  std::frexp(result.scale, &exponent);
  const double unit = std::ldexp(1.0, -exponent);
  const double square = result.scale * unit * result.scale * unit;
  const bool is_tall = w.rows >= w.cols;
  // Computes G times a block of rows of length n, G = W^T W or W W^T.
  const Index across = is_tall ? w.rows : w.cols;
  Matrix<T> image, product;
  const auto gram_times = [&](MatrixRef<const T> x) {
    safe_resize(image, x.rows, across);
    safe_resize(product, x.rows, n);
    if (is_tall) {
      block_times_transpose<T>(x, w, MatrixRef<T>(image), context);
      image *= static_cast<T>(unit);
      block_times<T>(MatrixRef<T>(image), w, MatrixRef<T>(product), context);
    } else {
      block_times<T>(x, w, MatrixRef<T>(image), context);
      image *= static_cast<T>(unit);
      block_times_transpose<T>(MatrixRef<T>(image), w, MatrixRef<T>(product), context);
    }
    product *= static_cast<T>(unit);
  };

  if (n <= exact_limit) {
    // || G / eps^2 - 1 ||_F, by blocks of columns of the identity.
    double total = 0.0;
    for (Index begin = 0; begin < n; begin += thin_limit) {
      const Index k = std::min(thin_limit, n - begin);
      Matrix<T> unit = Matrix<T>::Zero(k, n);
      for (Index i = 0; i < k; ++i) unit(i, begin + i) = T(1);
      gram_times(MatrixRef<T>(unit));
      total +=
          (product.template cast<double>() / square - unit.template cast<double>()).squaredNorm();
    }
    result.departure = std::sqrt(total);
    result.rigorous = true;
    return result;
  }
  // With probability 1 - 1e-10, one of b random unit vectors has a component of at least c /
  // sqrt(n) along the leading vector of the symmetric G / eps^2 - 1; the length of its image is at
  // least that part of the norm.
  constexpr Index b = 8;
  constexpr double c = 0.0703;  // 1e-10^(1/8) / 0.8
  Matrix<T> x(b, n);
  Random random(7);
  random.fill(MatrixRef<T>(x));
  for (Index i = 0; i < b; ++i) x.row(i) /= x.row(i).norm();
  gram_times(MatrixRef<T>(x));
  double longest = 0.0;
  for (Index i = 0; i < b; ++i) {
    const double l =
        (product.row(i).template cast<double>() / square - x.row(i).template cast<double>()).norm();
    longest = std::max(longest, l);
  }
  result.departure = longest * std::sqrt(static_cast<double>(n)) / c;
  return result;
}

template <class T>
LowRankDrift<T>::LowRankDrift(MatrixRef<const T> initial, const Isometry& isometry, Index limit)
    : initial_(initial), isometry_(isometry) {
  limit_ = std::min({limit, initial.rows, initial.cols});
  if (limit_ < 0) throw ShapeError("the limit of frames is negative");
  left_.resize(limit_, initial.rows);
  right_.resize(limit_, initial.cols);
  pending_.reserve(static_cast<std::size_t>(max_pending));
  pending_left_.resize(max_pending, initial.rows);
  pending_right_.resize(max_pending, initial.cols);
  if (!fits_frames<T>(isometry.scale) || !std::isfinite(isometry.departure)) closed_ = false;
}

template <class T>
LowRankDrift<T>::~LowRankDrift() = default;

template <class T>
Matrix<double> LowRankDrift<T>::core() const {
  if (n_left_ == 0 || n_right_ == 0) return Matrix<double>::Zero(n_left_, n_right_);
  return initial_factor_ * initial_core_ + core_;
}

// (W, V) <- (ww W + wv V, vw W + vv V).
template <class T>
void LowRankDrift<T>::combine(double ww, double wv, double vw, double vv) {
  // Copy first: if the allocation fails, the state is unchanged.
  const Matrix<double> before = core_;
  const auto mix = [&](auto& w, auto& v) {
    const auto old = w;
    w = ww * old + wv * v;
    v = vw * old + vv * v;
  };
  mix(initial_factor_, velocity_factor_);
  const double old_truncated = truncated_;
  truncated_ = std::abs(ww) * old_truncated + std::abs(wv) * velocity_truncated_;
  velocity_truncated_ = std::abs(vw) * old_truncated + std::abs(vv) * velocity_truncated_;
  if (core_.size() > 0) {
    core_ = ww * before + wv * velocity_core_;
    velocity_core_ = vw * before + vv * velocity_core_;
  }
  for (Pending& p : pending_) mix(p.weight, p.velocity);
}

template <class T>
void LowRankDrift<T>::append(double weight, double velocity, MatrixRef<const T> left,
                             MatrixRef<const T> right, const Context& context) {
  const Index k = left.rows;
  if (!closed_) return;
  for (Index begin = 0; begin < k; begin += max_pending) {
    const Index size = std::min(max_pending, k - begin);
    if (n_pending_ + size > max_pending) flush(context);
    if (!closed_) return;
    pending_left_.middleRows(n_pending_, size) = left.map().middleRows(begin, size);
    pending_right_.middleRows(n_pending_, size) = right.map().middleRows(begin, size);
    pending_.push_back({n_pending_, size, weight, velocity});
    n_pending_ += size;
  }
}

template <class T>
void LowRankDrift<T>::update(double factor, double scale, MatrixRef<const T> left,
                             MatrixRef<const T> right, const Context& context) {
  require_blocks(left, right, initial_);
  combine(factor, 0.0, 0.0, 1.0);
  append(scale, 0.0, left, right, context);
}

template <class T>
void LowRankDrift<T>::descend(double scale, double learning_rate, double weight_decay,
                              double momentum, MatrixRef<const T> left, MatrixRef<const T> right,
                              const Context& context) {
  require_blocks(left, right, initial_);
  // V' = momentum V + weight_decay W + G; W' = W - learning_rate V'.
  combine(1.0 - learning_rate * weight_decay, -learning_rate * momentum, weight_decay, momentum);
  append(-learning_rate * scale, scale, left, right, context);
}

namespace {

// Returns coefficients = block frame^T, and subtracts coefficients frame from the block. After one
// pass the remainder has rounding errors relative to the block, after two relative to itself.
template <class T>
Matrix<T> split(MatrixRef<T> block, MatrixRef<const T> frame, int passes, const Context& context) {
  Matrix<T> total = Matrix<T>::Zero(block.rows, frame.rows);
  if (frame.rows == 0 || block.rows == 0) return total;
  Matrix<T> part(block.rows, frame.rows);
  for (int pass = 0; pass < passes; ++pass) {
    multiply<T>(block, Op::none, frame, Op::transpose, MatrixRef<T>(part), context);
    multiply<T>(T(-1), MatrixRef<T>(part), Op::none, frame, Op::none, T(1), block, context);
    total += part;
  }
  return total;
}

}  // namespace

// Extends the frames by the span of new rows, which are orthogonal to them, and of their images
// under W_0.
template <class T>
bool LowRankDrift<T>::extend(MatrixRef<T> left_block, MatrixRef<T> right_block,
                             const Context& context) {
  const Index m = initial_.rows, n = initial_.cols;
  const auto inverse = static_cast<T>(1.0 / isometry_.scale);
  std::vector<double> lengths(static_cast<std::size_t>(max_pending + limit_));
  // Larger than the limit, to detect that it is exceeded.
  Matrix<T> left(limit_ + max_pending + limit_, m), right(limit_ + max_pending + limit_, n);
  left.topRows(n_left_) = left_.topRows(n_left_);
  right.topRows(n_right_) = right_.topRows(n_right_);
  Index n_left = n_left_, n_right = n_right_;
  Matrix<T> new_left = left_block.map(), new_right = right_block.map();
  while (new_left.rows() > 0 || new_right.rows() > 0) {
    const Index added_left = extend_basis<T>(left, n_left, new_left, outside_tolerance<T>(m),
                                             as_array(lengths), context);
    const Index added_right = extend_basis<T>(right, n_right, new_right, outside_tolerance<T>(n),
                                              as_array(lengths), context);
    if (n_left + added_left > limit_ || n_right + added_right > limit_) return false;
    safe_resize(new_right, added_left, n);
    safe_resize(new_left, added_right, m);
    if (added_left > 0) {
      block_times<T>(MatrixRef<T>(left).block(n_left, 0, added_left, m), initial_,
                     MatrixRef<T>(new_right), context);
      new_right *= inverse;
    }
    if (added_right > 0) {
      block_times_transpose<T>(MatrixRef<T>(right).block(n_right, 0, added_right, n), initial_,
                               MatrixRef<T>(new_left), context);
      new_left *= inverse;
    }
    n_left += added_left;
    n_right += added_right;
  }
  left_.topRows(n_left) = left.topRows(n_left);
  right_.topRows(n_right) = right.topRows(n_right);
  const auto grow = [&](Matrix<double>& c) {
    Matrix<double> larger = Matrix<double>::Zero(n_left, n_right);
    if (c.size() > 0) larger.topLeftCorner(c.rows(), c.cols()) = c;
    c = std::move(larger);
  };
  grow(core_);
  grow(velocity_core_);
  n_left_ = n_left;
  n_right_ = n_right;

  // K_0, and the parts of both images outside the frames, which bound the error of (1).
  Matrix<T> image(n_right, m), back(n_left, n);
  double outside = 0.0;
  safe_assign(initial_core_, Matrix<double>::Zero(n_left, n_right));
  if (n_right > 0) {
    block_times_transpose<T>(right_frame(), initial_, MatrixRef<T>(image), context);
    initial_core_ =
        split<T>(MatrixRef<T>(image), left_frame(), 2, context).transpose().template cast<double>();
    outside += image.template cast<double>().norm();
  }
  if (n_left > 0) {
    block_times<T>(left_frame(), initial_, MatrixRef<T>(back), context);
    split<T>(MatrixRef<T>(back), right_frame(), 2, context);
    outside += back.template cast<double>().norm();
  }
  truncated_ += std::abs(initial_factor_) * outside;
  velocity_truncated_ += std::abs(velocity_factor_) * outside;
  return true;
}

template <class T>
bool LowRankDrift<T>::flush(const Context& context) {
  if (!closed_) return false;
  if (n_pending_ == 0) return true;
  closed_ = false;  // an exception leaves a partial update
  if (!add_pending(context)) return false;
  const double current = magnitude();
  closed_ = current == 0.0 || fits_frames<T>(current);
  return closed_;
}

// Returns the larger of the largest entry of K and |s| eps.
template <class T>
double LowRankDrift<T>::magnitude() const {
  const double outside = std::abs(initial_factor_) * isometry_.scale;
  if (n_left_ == 0 || n_right_ == 0) return outside;
  return std::max(outside, core().cwiseAbs().maxCoeff());
}

// Adds the pending updates to C and C_v; returns false if the frames would exceed their limit.
template <class T>
bool LowRankDrift<T>::add_pending(const Context& context) {
  const auto left_block = [&] {
    return MatrixRef<T>(pending_left_.data(), n_pending_, initial_.rows);
  };
  const auto right_block = [&] {
    return MatrixRef<T>(pending_right_.data(), n_pending_, initial_.cols);
  };
  // Scale rows to length 1, so that directions count independently of the size of a gradient.
  std::vector<double> left_length(static_cast<std::size_t>(n_pending_)), right_length(left_length);
  for (Index i = 0; i < n_pending_; ++i) {
    left_length[i] = norm<T>(left_block().block(i, 0, 1, initial_.rows), context);
    right_length[i] = norm<T>(right_block().block(i, 0, 1, initial_.cols), context);
    if (left_length[i] > 0.0) pending_left_.row(i) /= static_cast<T>(left_length[i]);
    if (right_length[i] > 0.0) pending_right_.row(i) /= static_cast<T>(right_length[i]);
  }
  Matrix<T> left = split<T>(left_block(), left_frame(), 1, context);
  Matrix<T> right = split<T>(right_block(), right_frame(), 1, context);
  // Directions that would change W by less than a step's rounding error are not added but counted
  // as truncated: the directions of a nearly vanishing gradient are noise.
  const double rounding = 64.0 *
                          std::sqrt(static_cast<double>(std::max(initial_.rows, initial_.cols))) *
                          epsilon<T>() * magnitude();
  std::vector<double> left_outside(left_length), right_outside(left_length);
  std::vector<char> is_new(2 * left_length.size(), 0);
  const auto find_new = [&] {
    bool any_new = false;
    for (const Pending& p : pending_) {
      for (Index i = p.begin; i < p.begin + p.size; ++i) {
        left_outside[i] = static_cast<double>(pending_left_.row(i).norm());
        right_outside[i] = static_cast<double>(pending_right_.row(i).norm());
        const double size = std::abs(p.weight) * left_length[i] * right_length[i];
        const auto matters = [&](double outside, Index length) {
          return outside > outside_tolerance<T>(length) && size * outside > rounding;
        };
        is_new[2 * i] = matters(left_outside[i], initial_.rows);
        is_new[2 * i + 1] = matters(right_outside[i], initial_.cols);
        any_new = any_new || is_new[2 * i] || is_new[2 * i + 1];
      }
    }
    return any_new;
  };
  if (find_new()) {
    const auto split_again = [&](Matrix<T>& coefficients, MatrixRef<T> block,
                                 MatrixRef<const T> frame) {
      Matrix<T> all = split<T>(block, frame, 2, context);
      all.leftCols(coefficients.cols()) += coefficients;
      coefficients = std::move(all);
    };
    split_again(left, left_block(), left_frame());
    split_again(right, right_block(), right_frame());
    Matrix<T> left_new = left_block().map(), right_new = right_block().map();
    for (Index i = 0; i < n_pending_; ++i) {
      if (!is_new[2 * i]) left_new.row(i).setZero();
      if (!is_new[2 * i + 1]) right_new.row(i).setZero();
    }
    if (!extend(MatrixRef<T>(left_new), MatrixRef<T>(right_new), context)) {
      truncated_ = infinity;
      return false;
    }
    split_again(left, left_block(), left_frame());
    split_again(right, right_block(), right_frame());
    find_new();  // updates the lengths outside the frames
  }
  if (n_left_ == 0 || n_right_ == 0) {  // all updates are zero
    pending_.clear();
    n_pending_ = 0;
    return true;
  }
  for (const Pending& p : pending_) {
    Matrix<double> scaled = left.middleRows(p.begin, p.size).template cast<double>();
    for (Index i = p.begin; i < p.begin + p.size; ++i) {
      const double length = left_length[i] * right_length[i];
      scaled.row(i - p.begin) *= length;
      // || l r^T - (its part in the frames) || <= |l outside| |r| + |l inside| |r outside|
      const double error = length * (left_outside[i] + right_outside[i]);
      truncated_ += std::abs(p.weight) * error;
      velocity_truncated_ += std::abs(p.velocity) * error;
    }
    const Matrix<double> product =
        scaled.transpose() * right.middleRows(p.begin, p.size).template cast<double>();
    core_ += p.weight * product;
    velocity_core_ += p.velocity * product;
  }
  pending_.clear();
  n_pending_ = 0;
  return true;
}

template Isometry measure_isometry<float>(MatrixRef<const float>, const Context&, Index);
template Isometry measure_isometry<double>(MatrixRef<const double>, const Context&, Index);
template class LowRankDrift<float>;
template class LowRankDrift<double>;

}  // namespace dlnfast
