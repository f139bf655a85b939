// SPDX-License-Identifier: MIT
#include "dlnfast/svd_tracker.hpp"

#include <Eigen/Eigenvalues>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "dlnfast/basis.hpp"
#include "dlnfast/descent.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/renew.hpp"
#include "dlnfast/singular_values.hpp"
#include "dlnfast/workspace.hpp"
#include "numbers.hpp"

namespace dlnfast {
namespace {

using Clock = std::chrono::steady_clock;

// Smaller matrices are decomposed as a whole: that takes no longer than a few sweeps.
constexpr Index full_size = 128;
// Random starts of a certificate, and the most products of a start with M^T M.
constexpr Index n_starts = 8;
constexpr Index most_steps = 16;

// Frames of the factored form hold at most so many vectors.
constexpr Index coordinate_room = 256;

double square(double x) { return x * x; }

template <class T>
MatrixRef<const T> top(const Matrix<T>& m, Index k) {
  return {m.data(), k, m.cols()};
}

// Of the distance between eigenvalues of [A R^T; R C] and of diag(A, C): the gap between one of A and
// all of C is g, |R| = eta.
double perturbed(double gap, double eta) {
  if (eta == 0.0) return 0.0;
  return 2.0 * square(eta) / (gap + std::hypot(gap, 2.0 * eta));
}

// A bound on ||M|| and what it rests on.
struct Bound {
  double value = infinity;
  Completeness kind = Completeness::none;

  void at_most(double other, Completeness other_kind) {
    if (other < value) {
      value = other;
      kind = other_kind;
    }
  }
};

// A matrix times a power of two, so that squares of squares neither overflow nor vanish. A large factor
// goes to the vectors, before products with them become subnormal; a small one to the products.
template <class T>
class ScaledOperator final : public LinearOperator<T> {
 public:
  // `scratch` holds scaled vectors, and serves as long as this does.
  ScaledOperator(const LinearOperator<T>& w, double factor, Matrix<T>& scratch)
      : w_(w), factor_(static_cast<T>(factor)), scratch_(scratch) {}
  Index rows() const override { return w_.rows(); }
  Index cols() const override { return w_.cols(); }
  void apply(MatrixRef<const T> x, MatrixRef<T> y, const Context& context) const override {
    w_.apply(enlarged(x), y, context);
    if (factor_ < T(1)) y.map() *= factor_;
  }
  void apply_transpose(MatrixRef<const T> x, MatrixRef<T> y,
                       const Context& context) const override {
    w_.apply_transpose(enlarged(x), y, context);
    if (factor_ < T(1)) y.map() *= factor_;
  }

 private:
  MatrixRef<const T> enlarged(MatrixRef<const T> x) const {
    if (!(factor_ > T(1))) return x;
    renew(scratch_, x.rows, x.cols);
    scratch_ = factor_ * x.map();
    return scratch_;
  }

  const LinearOperator<T>& w_;
  T factor_;
  Matrix<T>& scratch_;
};

// Decomposes a core in double precision: R = A diag(s) B^T.
struct SmallDecomposition {
  Matrix<double> a, s, b;

  template <class T>
  SmallDecomposition(const Matrix<T>& r, const Context& context)
      : a(r.rows(), std::min(r.rows(), r.cols())),
        s(1, std::min(r.rows(), r.cols())),
        b(r.cols(), std::min(r.rows(), r.cols())) {
    const Matrix<double> core = r.template cast<double>();
    if (core.rows() == core.cols() && core.rows() <= jacobi_limit && by_rotations(core)) return;
    singular_values<double>(MatrixRef<const double>{core.data(), core.rows(), core.cols()},
                            MatrixRef<double>(s), MatrixRef<double>(a), MatrixRef<double>(b),
                            context);
  }

 private:
  static constexpr Index jacobi_limit = 40;

  // One-sided rotations of the rows (Hestenes), until all pairs are orthogonal: few sweeps where the
  // core is all but diagonal, as it is from one event to the next. False where they are not enough.
  bool by_rotations(const Matrix<double>& core) {
    constexpr int most_sweeps = 6;
    const Index p = core.rows();
    Matrix<double> rows = core;
    Matrix<double> turn = Matrix<double>::Identity(p, p);
    const double floor = square(1e-15) * core.squaredNorm();
    bool done = false;
    for (int sweep = 0; sweep < most_sweeps && !done; ++sweep) {
      done = true;
      for (Index i = 0; i < p; ++i) {
        for (Index j = i + 1; j < p; ++j) {
          const double x = rows.row(i).squaredNorm();
          const double y = rows.row(j).squaredNorm();
          const double z = rows.row(i).dot(rows.row(j));
          if (std::abs(z) <= 1e-15 * std::sqrt(x) * std::sqrt(y) || std::abs(z) <= floor) continue;
          done = false;
          const double zeta = (y - x) / (2.0 * z);
          const double t = (zeta >= 0.0 ? 1.0 : -1.0) / (std::abs(zeta) + std::hypot(1.0, zeta));
          const double c = 1.0 / std::hypot(1.0, t);
          const double d = c * t;
          const auto rotate = [&](Matrix<double>& m) {
            for (Index k = 0; k < p; ++k) {
              const double first = m(i, k), second = m(j, k);
              m(i, k) = c * first - d * second;
              m(j, k) = d * first + c * second;
            }
          };
          rotate(rows);
          rotate(turn);
        }
      }
    }
    if (!done) return false;
    std::vector<std::pair<double, Index>> order;
    for (Index i = 0; i < p; ++i) order.push_back({-rows.row(i).norm(), i});
    std::sort(order.begin(), order.end());
    const double largest = -order[0].first;
    // Rows of rounding have no directions of their own.
    if (-order[static_cast<std::size_t>(p) - 1].first <= 1e-13 * largest) return false;
    for (Index i = 0; i < p; ++i) {
      const auto [negative, at] = order[static_cast<std::size_t>(i)];
      s(0, i) = -negative;
      a.col(i) = turn.row(at).transpose();
      b.col(i) = rows.row(at).transpose() / -negative;
    }
    return true;
  }
};

}  // namespace

template <class T>
class SvdTracker<T>::Impl {
 public:
  Impl(Index m, Index n, const TrackerSettings& settings)
      : m_(m),
        n_(n),
        settings_(settings),
        random_(settings.seed + 1),
        branches_(settings.branches),
        core_branches_(settings.branches) {
    if (m < 1 || n < 1) {
      throw ShapeError("a matrix of shape (" + std::to_string(m) + ", " + std::to_string(n) +
                       ") has no singular values to track");
    }
    if (settings.n_values < 1) throw ShapeError("the number of singular values is below 1");
    if (settings.n_guards < 0) throw ShapeError("the number of guards is negative");
    smaller_ = std::min(m, n);
    k_ = std::min(settings.n_values, smaller_);
    p_ = std::min(k_ + std::min(settings.n_guards, smaller_), smaller_);
    full_ = settings.mode == TrackerMode::full || (settings.mode == TrackerMode::automatic &&
                                                   (smaller_ <= full_size || 3 * p_ >= smaller_));
    values_.assign(static_cast<std::size_t>(p_), 0.0);
  }

  const TrackerRecord& update(const LinearOperator<T>& w, const MatrixRef<const T>* matrix,
                              double drift, const Context& context) {
    const auto start = Clock::now();
    require_shape(MatrixRef<const T>(nullptr, w.rows(), w.cols()), m_, n_, "W");
    if (full_ && matrix == nullptr && settings_.mode == TrackerMode::full) {
      throw std::invalid_argument("a full decomposition needs the matrix itself");
    }
    context_ = context;
    context_.workspace = &workspace_;
    leave_factored();
    compares_ = matrix != nullptr && !full_ && origin_norm_.kind != Completeness::none &&
                event_ >= origin_due_;
    double norm = nan;
    if (compares_) {
      const NormAndProduct both = norm_and_product<T>(*matrix, origin_, context_);
      norm = std::sqrt(both.squared_norm);
      origin_product_ = both.inner_product;
      // Products with the origin are not scaled before they are formed.
      compares_ = is_exact_square(both.squared_norm) &&
                  norm >= std::sqrt(static_cast<double>(std::numeric_limits<T>::min()));
    }
    if (!compares_) norm = w.norm(context_);
    if (matrix != nullptr && !std::isfinite(norm)) {
      throw std::domain_error("a matrix to track is not finite, or its norm overflows");
    }
    const bool scale_changed = choose_scale(w, norm, matrix != nullptr);
    // Nothing of before is in these units.
    const double moved = drift >= 0.0 && !scale_changed ? drift * factor_ : infinity;
    drift_ += moved;
    begin_record();
    if (full_ && matrix != nullptr) {
      decompose(*matrix);
    } else {
      try {
        iterate(ScaledOperator<T>(w, factor_, enlarged_), matrix);
      } catch (...) {  // the blocks may hold anything: the next event begins anew
        seeded_ = has_vectors_ = false;
        anchor_ = {};
        upcoming_.resize(0, 0);
        right_next_.resize(0, 0);
        throw;
      }
    }
    last_drift_ = moved;
    finish_record(start);
    scale_back();
    return record_;
  }

  // Everything of an event is in units in which W is of size 1, the same ones from event to event as long
  // as they fit. Returns whether they are others than before. The norm of an operator may be unknown, or
  // its square may have vanished or overflowed: then a product tells the size.
  bool choose_scale(const LinearOperator<T>& w, double norm, bool is_known) {
    double size = std::isfinite(norm) ? norm : 0.0;
    if (!(size > 0.0) && !is_known) {
      Matrix<T> x(1, n_), y(1, m_);
      random_.fill(MatrixRef<T>(x));
      w.apply(MatrixRef<T>(x), MatrixRef<T>(y), context_);
      if (!y.allFinite()) {
        throw std::domain_error("products with the tracked matrix are not finite");
      }
      size = static_cast<double>(y.cwiseAbs().maxCoeff());
      if (size > 0.0) norm = nan;
    }
    const double before = factor_;
    const double now = size * factor_;
    if (size > 0.0 && (now < 0x1p-24 || now > 0x1p24)) {
      int exponent = 0;
      std::frexp(size, &exponent);
      factor_ = std::ldexp(1.0, std::clamp(-exponent, -limit_exponent, limit_exponent));
    }
    if (factor_ != before) {
      anchor_ = {};
      origin_norm_ = {};
      origin_of_left_ = origin_of_right_ = {};
      compares_ = false;
      drift_ = infinity;
    }
    squared_norm_ = std::isfinite(norm) ? square(norm * factor_) : -1.0;
    origin_product_ = origin_product_ * factor_ * factor_;
    return factor_ != before;
  }

  void scale_back() {
    if (factor_ == 1.0) return;
    const double back = 1.0 / factor_;
    for (auto* list : {&record_.values, &record_.errors, &record_.gaps}) {
      for (double& x : *list) x *= back;
    }
    for (double* x :
         {&record_.norm, &record_.tail, &record_.drift, &record_.rho, &record_.rho_spread}) {
      *x *= back;
    }
    // A value that became subnormal was rounded, and so was its bound.
    for (double& x : record_.errors) x += std::numeric_limits<double>::denorm_min();
    record_.tail += std::numeric_limits<double>::denorm_min();
  }

  const TrackerRecord& update(const LowRankDrift<T>& drift, const Context& context);
  void make_vectors();

  // Between two events: whom the last one told that it is alive may be gone.
  void make_vectors_alone() {
    context_.monitor = nullptr;
    make_vectors();
  }

  // From here on W itself is followed, from the vectors of the factored form on.
  void leave_factored() {
    if (factored_ == nullptr) return;
    make_vectors();
    branches_.adopt(core_branches_, MatrixRef<T>(left_next_), MatrixRef<T>(right_next_));
    factored_ = nullptr;
    seeded_ = true;
  }

  void set_origin(MatrixRef<const T> w) {
    require_shape(w, m_, n_, "the origin");
    origin_ = w;
    origin_norm_ = {};
  }

  void seed(MatrixRef<const T> right, const Context& context) {
    require_shape(right, right.rows, n_, "the seed");
    allocate();
    const Index k = std::min(right.rows, p_);
    right_next_.topRows(k) = right.map().topRows(k);
    random_.fill(MatrixRef<T>(right_next_).block(k, 0, p_ - k, n_));
    orthonormalize<T>(right_next_, random_, context);
    seeded_ = true;
  }

  void set_reference() {
    if (record_.tier == Tier::factored) {
      core_branches_.set_reference();
    } else {
      branches_.set_reference();
    }
  }
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right) {
    require_shape(left, left.rows, m_, "the reference's left vectors");
    require_shape(right, left.rows, n_, "the reference's right vectors");
    branches_.set_reference(left, right);
  }

  Index m_, n_;
  TrackerSettings settings_;
  Index smaller_ = 0, k_ = 0, p_ = 0;
  TrackerRecord record_;
  std::int64_t n_refreshes_ = 0, n_certificates_ = 0;
  // Reported vectors, p rows (u', v').
  Matrix<T> left_next_, right_next_;
  bool has_vectors_ = false;

 private:
  // ------------------------------------------------------------------------------------ one sweep

  void allocate() {
    if (right_next_.rows() == p_) return;
    renew(left_, p_, m_);
    renew(right_, p_, n_);
    renew(left_next_, p_, m_);
    renew(scratch_, 1, p_ * std::max(m_, n_));
    values_.resize(static_cast<std::size_t>(p_), 0.0);
    residual_.assign(static_cast<std::size_t>(p_), 0.0);
    renew(right_next_, p_, n_);  // last: its size tells that all have theirs
  }

  void grow(Index p) {
    const Index old = p_;
    p_ = p;
    for (Matrix<T>* block : {&left_, &left_next_, &right_, &right_next_, &image_}) {
      if (block->rows() == 0) continue;
      block->conservativeResize(p_, Eigen::NoChange);
      block->bottomRows(p_ - old).setZero();
    }
    // No vector of before has a part in the new ones.
    rotation_.conservativeResizeLike(Matrix<double>::Identity(p_, p_));
    rotation_.bottomRows(p_ - old).leftCols(old).setZero();
    rotation_.topRows(old).rightCols(p_ - old).setZero();
    renew(scratch_, 1, p_ * std::max(m_, n_));
    for (auto* list : {&values_, &pair_values_, &residual_}) {
      list->resize(static_cast<std::size_t>(p_), 0.0);
    }
  }

  // For y = (product of x with W): x and y become vectors with W x_i = s_i y_i, y orthonormal.
  void diagonalize(Matrix<T>& x, Matrix<T>& y, std::vector<double>& values) {
    const Index p = y.rows();
    MatrixRef<T> product(scratch_.data(), p, y.cols());
    product.map() = y;
    orthonormalize<T>(y, random_, context_);
    Matrix<T> r(p, p);
    multiply<T>(product, Op::none, MatrixRef<T>(y), Op::transpose, MatrixRef<T>(r), context_);
    if (!r.allFinite()) throw std::domain_error("products with the tracked matrix are not finite");
    const SmallDecomposition d(r, context_);
    rotate(y, d.b);
    rotate(x, d.a);
    renew_as(rotation_, d.a);
    for (Index i = 0; i < p; ++i) values[i] = d.s(0, i);
  }

  // x <- a^T x.
  void rotate(Matrix<T>& x, const Matrix<double>& a) {
    const Matrix<T> rotation = a.template cast<T>();
    MatrixRef<T> old(scratch_.data(), x.rows(), x.cols());
    old.map() = x;
    multiply<T>(MatrixRef<const T>{rotation.data(), rotation.rows(), rotation.cols()},
                Op::transpose, old, Op::none, MatrixRef<T>(x), context_);
  }

  // From right_next_: the pair (left_, right_) with its residual, and the better pair (.._next_).
  void sweep(const LinearOperator<T>& w) {
    right_.swap(right_next_);
    anchor_is_pair_ = false;
    w.apply(MatrixRef<T>(right_), MatrixRef<T>(left_), context_);
    pair_values_.resize(static_cast<std::size_t>(p_));
    diagonalize(right_, left_, pair_values_);
    w.apply_transpose(MatrixRef<T>(left_), MatrixRef<T>(right_next_), context_);
    if (compares_) renew_as(image_, right_next_);
    record_.n_columns += 2 * p_;
    credit_ += settings_.certificate_share * 2.0 * static_cast<double>(p_);
    for (Index i = 0; i < p_; ++i) {
      const T value = static_cast<T>(pair_values_[i]);
      residual_[i] =
          square(static_cast<double>((right_next_.row(i) - value * right_.row(i)).norm()));
    }
    renew_as(left_next_, left_);
    diagonalize(left_next_, right_next_, values_);
    slack_ = rounding_beside(values_[0]);
  }

  // What rounding may add to a singular value, here or in LAPACK.
  double rounding_beside(double largest) const {
    return 16.0 * epsilon<T>() * std::sqrt(static_cast<double>(std::max(m_, n_))) * largest +
           64.0 * std::numeric_limits<double>::min();
  }

  // || R ||_F of the vectors begin .. end - 1 of the pair.
  double residual(Index begin, Index end) const {
    double total = 0.0;
    for (Index i = begin; i < end; ++i) total += residual_[i];
    return std::sqrt(total) + slack_;
  }

  // --------------------------------------------------------------------------------------- bounds

  // tails_[j]: bound on what is outside the first j vectors of the pair.
  void find_tails() {
    tails_.assign(static_cast<std::size_t>(p_) + 1, Bound{});
    if (p_ == smaller_) tails_[p_].at_most(slack_, Completeness::rigorous);
    if (squared_norm_ >= 0.0) {
      double rest = squared_norm_ * (1.0 + 64.0 * epsilon<T>());
      double removed = 0.0;
      for (Index j = 0; j <= p_; ++j) {
        const double m = std::sqrt(std::max(rest - removed, 0.0));
        tails_[j].at_most(m + slack_, Completeness::rigorous);
        // Of a pair with rounding, s_i^2 + |r_i|^2 is this much at least.
        if (j < p_) {
          removed += (square(pair_values_[j]) + residual_[j]) * (1.0 - 16.0 * epsilon<T>());
        }
      }
    }
    if (anchor_.kind != Completeness::none && anchor_is_pair_) {
      tails_[anchor_rank_].at_most(anchor_.value + slack_, anchor_.kind);
    } else if (anchor_.kind != Completeness::none && std::isfinite(drift_)) {
      const double grown = anchor_.value + drift_;
      if (anchor_rank_ < p_) carry(anchor_rank_, grown);
      carry(p_, grown);
    }
    // A bound for j vectors holds for more of them, and with their values and residuals for fewer.
    for (Index j = 1; j <= p_; ++j) tails_[j].at_most(tails_[j - 1].value, tails_[j - 1].kind);
    const std::vector<Bound> direct = tails_;
    for (Index j = 0; j < p_; ++j) {
      for (Index l = j + 1; l <= p_; ++l) {
        const double below = std::max(pair_values_[j], direct[l].value) + residual(j, l);
        tails_[j].at_most(below, direct[l].kind);
      }
    }
  }

  // The image under W_0 of vectors that mostly turn within a subspace: then those of the subspace are
  // turned with them.
  struct KnownImage {
    Matrix<T> vectors, image;

    // Brings `image` up to date for x; returns how far it may be off, relative to the norm of W_0.
    template <class Apply>
    double find(const Matrix<T>& x, Impl& tracker, const Apply& apply) {
      const Index p = x.rows();
      if (vectors.rows() == p) {
        Matrix<T> turn(p, p);
        multiply<T>(top(x, p), Op::none, top(vectors, p), Op::transpose, MatrixRef<T>(turn),
                    tracker.context_);
        Matrix<T> rest = x;
        multiply<T>(T(-1), top(turn, p), Op::none, top(vectors, p), Op::none, T(1),
                    MatrixRef<T>(rest), tracker.context_);
        const double outside = static_cast<double>(rest.norm());
        if (error + outside <= 256.0 * epsilon<T>()) {
          Matrix<T> old = image;
          multiply<T>(top(turn, p), Op::none, top(old, p), Op::none, MatrixRef<T>(image),
                      tracker.context_);
          renew_as(vectors, x);
          error += outside + 8.0 * epsilon<T>();
          return error;
        }
      }
      apply(x, image);
      tracker.record_.n_columns += p;
      renew_as(vectors, x);
      error = 0.0;
      return error;
    }

    double error = 0.0;
  };

  // Bounds what is outside all p vectors by the matrix W_0 that the drift began from:
  // |M| <= |c| |W_0| + ||M - c M_0||_F, with M_0 what is outside of W_0 and the best c. Sharp where W
  // has moved within few directions, which the vectors hold. As W x = s u for the pair, M = W - u^T Z
  // with Z = u W, and all norms follow from inner products. 4 m n p flops, one pass over both.
  void compare_with_origin() {
    // || x W_0 - (what is used for it) ||_F, relative to |W_0|.
    double outside = origin_of_left_.find(left_, *this, [&](const Matrix<T>& x, Matrix<T>& y) {
      renew(y, p_, n_);
      block_times<T>(top(x, p_), origin_, MatrixRef<T>(y), context_);
      y *= static_cast<T>(factor_);
    });
    outside += origin_of_right_.find(right_, *this, [&](const Matrix<T>& x, Matrix<T>& y) {
      renew(y, p_, m_);
      block_times_transpose<T>(top(x, p_), origin_, MatrixRef<T>(y), context_);
      y *= static_cast<T>(factor_);
    });
    const Matrix<T>& back = origin_of_left_.image;
    const Matrix<T>& forth = origin_of_right_.image;
    Matrix<T> corner(p_, p_);
    multiply<T>(top(left_, p_), Op::none, top(forth, p_), Op::transpose, MatrixRef<T>(corner),
                context_);
    const auto squares = [&](const Matrix<T>& x) {
      return squared_norm<T>(MatrixRef<const T>{x.data(), x.rows(), x.cols()}, context_);
    };
    const double of_origin = origin_square_ - squares(back) - squares(forth) + squares(corner);
    const double of_w = squared_norm_ - squares(image_);
    const double between =
        origin_product_ - inner_product<T>(top(image_, p_), top(back, p_), context_);
    const double c = of_origin > 0.0 ? between / of_origin : 0.0;
    const double rounding = 64.0 * epsilon<T>() * (squared_norm_ + square(c) * origin_square_);
    const double rest = of_w - 2.0 * c * between + square(c) * of_origin;
    // Each of the images enters with a norm of at most |W_0| sqrt(p), or that of W's image.
    const double images = std::sqrt(squared_norm_) + std::abs(c) * std::sqrt(origin_square_);
    const double error = 4.0 * outside * std::abs(c) * origin_norm_.value * images;
    const double value =
        std::abs(c) * origin_norm_.value + std::sqrt(std::max(rest, 0.0) + rounding + error);
    set_anchor({value + slack_, origin_norm_.kind}, p_);
  }

  // What is outside the first j vectors of the pair is bounded, and carried on from here.
  void set_anchor(const Bound& bound, Index j) {
    anchor_ = bound;
    anchor_rank_ = j;
    renew_both(anchor_left_, left_.topRows(j), anchor_right_, right_.topRows(j));
    anchor_top_ = pair_values_[0];
    anchor_residual_ = j > 0 ? residual(0, j) : 0.0;
    anchor_is_pair_ = true;
    drift_ = 0.0;
  }

  // What is outside the first j vectors, from what was outside the anchor's.
  void carry(Index j, double grown) {
    const double a = outside(anchor_left_, left_, j);
    const double b = outside(anchor_right_, right_, j);
    const double leak = a * b * anchor_top_ + (a + b) * anchor_residual_;
    tails_[j].at_most(grown + leak + slack_, anchor_.kind);
  }

  // || x (1 - y^T y) ||_F for the first j rows of y.
  double outside(const Matrix<T>& x, const Matrix<T>& y, Index j) const {
    if (x.rows() == 0) return 0.0;
    Matrix<T> overlap(x.rows(), j);
    Matrix<T> rest = x;
    if (j > 0) {
      multiply<T>(top(x, x.rows()), Op::none, top(y, j), Op::transpose, MatrixRef<T>(overlap),
                  context_);
      multiply<T>(T(-1), MatrixRef<T>(overlap), Op::none, top(y, j), Op::none, T(1),
                  MatrixRef<T>(rest), context_);
    }
    return static_cast<double>(rest.norm()) + 8.0 * epsilon<T>();
  }

  // From the tails: how large each of the first k singular values can be.
  void find_errors() {
    find_tails();
    double largest = 0.0;
    Completeness kind = Completeness::rigorous;
    for (Index i = 0; i < k_; ++i) {
      Bound upper;
      // Of the whole of one side: then the product has all singular values.
      if (p_ == smaller_) upper.at_most(values_[i], Completeness::rigorous);
      for (Index j = 0; j <= p_; ++j) {
        const double eta = residual(0, j);
        const double tail = tails_[j].value;
        const bool clear = i < j && pair_values_[i] > tail;
        const double bound =
            clear ? pair_values_[i] + perturbed(pair_values_[i] - tail, eta) : tail + eta;
        upper.at_most(bound, tails_[j].kind);
      }
      record_.errors[i] = std::max(upper.value - values_[i], 0.0) + slack_;
      largest = std::max(largest, record_.errors[i]);
      kind = std::min(kind, upper.kind);
    }
    worst_error_ = largest;
    record_.completeness = good_enough() ? kind : Completeness::none;
    record_.tail = tails_[k_].value + (k_ > 0 ? residual(0, k_) : 0.0);
  }

  bool good_enough() const {
    return worst_error_ <= settings_.tolerance * values_[0] + 16.0 * slack_;
  }

  // How many vectors stand clear of what follows, and have converged.
  Index split() const {
    const Index most = std::min(k_, p_ - 1);
    for (Index j = most; j > 0; --j) {
      const double gap = pair_values_[j - 1] - pair_values_[j];
      if (gap > 0.4 * settings_.tolerance * pair_values_[j - 1] &&
          residual(0, j) < 0.25 * gap + slack_)
        return j;
    }
    return 0;
  }

  // --------------------------------------------------------------------------------- certificates

  void project_out(MatrixRef<T> x, MatrixRef<const T> q) {
    dlnfast::project_out<T>(x, q, context_);
  }

  // Bounds what is outside the first j vectors of the pair, by a block Krylov space. Returns the largest
  // Ritz value, and leaves up to `wanted` Ritz vectors in ritz_.
  double certify(const LinearOperator<T>& w, Index j, Index wanted) {
    ++n_certificates_;
    const Index dims = n_ - j;
    const Index b = std::min(n_starts, dims);
    const Index room = std::min(b * most_steps, dims);
    renew(basis_, room + 2 * b, n_);
    renew(images_, room + b, m_);
    Matrix<double> gram = Matrix<double>::Zero(room + b, room + b);
    const MatrixRef<const T> u = top(left_, j), v = top(right_, j);

    MatrixRef<T> block = MatrixRef<T>(basis_).block(0, 0, b, n_);
    random_.fill(block);
    project_out(block, v);
    orthonormalize<T>(block, random_, context_);
    project_out(block, v);

    const double starts = static_cast<double>(b);
    const double reach = std::log(1.648 * std::sqrt(static_cast<double>(dims))) -
                         std::log(settings_.failure) / starts;
    const double overlap = std::pow(settings_.failure, 1.0 / starts) / 0.8;
    const double blow_up = std::sqrt(static_cast<double>(dims)) / overlap;
    const double enough = settings_.tolerance * values_[0];

    double theta = 0.0, bound = infinity;
    Index size = 0;
    Index fresh = b;
    for (Index step = 1; fresh > 0; ++step) {
      context_.breathe();
      MatrixRef<T> q = MatrixRef<T>(basis_).block(size, 0, fresh, n_);
      MatrixRef<T> y = MatrixRef<T>(images_).block(size, 0, fresh, m_);
      w.apply(q, y, context_);
      project_out(y, u);
      const Index total = size + fresh;
      Matrix<T> products(fresh, total);
      multiply<T>(y, Op::none, top(images_, total), Op::transpose, MatrixRef<T>(products),
                  context_);
      gram.block(size, 0, fresh, total) = products.template cast<double>();
      gram.block(0, size, total, fresh) = products.template cast<double>().transpose();
      record_.n_columns += fresh;
      if (!products.allFinite()) {
        throw std::domain_error("products with the tracked matrix are not finite");
      }
      size = total;

      // The next block, and what is left of it: A Q - Q T.
      MatrixRef<T> next = MatrixRef<T>(basis_).block(size, 0, fresh, n_);
      w.apply_transpose(y, next, context_);
      record_.n_columns += fresh;
      project_out(next, v);
      project_out(next, top(basis_, size));
      const double left_over = static_cast<double>(next.map().norm());

      const double scale = products.cwiseAbs().maxCoeff();  // of M^T M on these vectors
      // Less than this is left out: it counts in the bound.
      const double tiny =
          std::pow(epsilon<T>(), 0.75) * std::max({scale, square(theta), square(slack_)});
      const bool full = size >= room || step == most_steps;
      fresh = full ? 0 : next_block(next, size, v, tiny);
      if (step > 1 && step % 2 == 1 && fresh > 0) continue;

      const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(gram.topLeftCorner(size, size),
                                                                 Eigen::EigenvaluesOnly);
      theta = std::sqrt(std::max(eigen.eigenvalues()[size - 1], 0.0));
      const double root = reach / (2.0 * static_cast<double>(step) - 1.0);
      const double rounding = 8.0 * epsilon<T>() * square(theta);
      double best = std::sqrt(square(theta) + (left_over + rounding) * blow_up);
      if (root < 1.0) best = std::min(best, theta / std::sqrt(1.0 - square(root)));
      if (size == dims) best = theta;  // the whole space
      bound = std::min(bound, best + slack_);
      // Good where the tracked values stand clear, or where the bound itself is sharp.
      const double clear = j >= k_ && j > 0 ? pair_values_[j - 1] - theta : 0.0;
      if (size >= wanted && bound - theta <= std::max(0.25 * enough, 0.25 * clear)) break;
    }
    // Narrow products take about twice as long for each vector.
    credit_ -= 2.0 * static_cast<double>(2 * size);
    set_anchor({bound, Completeness::probabilistic}, j);
    space_closed_ = fresh == 0 && size < room;
    if (wanted > 0) take_ritz_vectors(gram.topLeftCorner(size, size), j, wanted);
    return theta;
  }

  // The leading Ritz vectors, to go with j others. Where the Krylov space closed, few values differ from
  // one that most share: then those above it, as many of the shared one as are reported, and those below
  // it, which turn with the ones above in layers from an orthogonal start; with more guards than before
  // if need be.
  void take_ritz_vectors(const Eigen::MatrixXd& gram, Index j, Index wanted) {
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> eigen(gram);
    const Eigen::VectorXd& values = eigen.eigenvalues();
    const Index size = values.size();
    std::vector<Index> chosen;
    if (space_closed_) {
      // As many copies of the shared value as there were starts; of the others one each.
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
      const Index n_shared = std::clamp<Index>(k_ - n_above, 0, static_cast<Index>(shared.size()));
      const Index needed = n_above + n_shared + static_cast<Index>(below.size());
      const Index most = std::min(std::max(p_, thin_limit), smaller_ / 3);
      if (needed > p_) grow(std::min(needed, std::max(most, p_)));
      closed_split_ = std::min({n_above, k_, p_ - 1});
      wanted = p_ - j;
      chosen = above;
      chosen.insert(chosen.end(), shared.begin(), shared.begin() + n_shared);
      chosen.insert(chosen.end(), below.begin(), below.end());
      chosen.insert(chosen.end(), shared.begin() + n_shared, shared.end());
    } else {
      for (Index i = size - 1; i >= 0; --i) chosen.push_back(i);
    }
    const Index kept = std::min(wanted, size);
    Matrix<T> turn(kept, size);
    for (Index i = 0; i < kept; ++i) {
      turn.row(i) = eigen.eigenvectors().col(chosen[i]).transpose().template cast<T>();
    }
    renew(ritz_, kept, n_);
    multiply<T>(top(turn, kept), Op::none, top(basis_, size), Op::none, MatrixRef<T>(ritz_),
                context_);
  }

  // Makes the next Krylov block, already free of v and of the basis, orthonormal; returns how many
  // rows it has: those longer than `tiny`.
  Index next_block(MatrixRef<T> next, Index size, MatrixRef<const T> v, double tiny) {
    Matrix<T> block = next.map();
    std::vector<double> lengths(static_cast<std::size_t>(next.rows));
    const Index rank =
        extend_basis<T>(next, 0, MatrixRef<T>(block), tiny, lengths.data(), context_);
    if (rank == 0) return 0;
    // Rounding along v and the basis was divided by the lengths.
    MatrixRef<T> kept = next.block(0, 0, rank, n_);
    project_out(kept, v);
    project_out(kept, top(basis_, size));
    orthonormalize<T>(kept, random_, context_);
    return rank;
  }

  // A block to go on from: the j leading vectors, the Ritz vectors, and of the others what fits. It may
  // be right_next_ itself.
  void replace_guards(Index j, Matrix<T>& block_out) {
    Matrix<T> basis(2 * p_ + ritz_.rows(), n_);
    std::vector<double> lengths(static_cast<std::size_t>(p_ + ritz_.rows()));
    basis.topRows(j) = right_next_.topRows(j);
    Index n = j;
    for (Matrix<T> block : {Matrix<T>(ritz_), Matrix<T>(right_next_.bottomRows(p_ - j))}) {
      if (n >= p_) break;
      n += extend_basis<T>(MatrixRef<T>(basis), n, block, 1e-3, lengths.data(), context_);
    }
    const Index kept = std::min(n, p_);
    renew(block_out, p_, n_);
    block_out.topRows(kept) = basis.topRows(kept);
    if (kept < p_) random_.fill(MatrixRef<T>(block_out).block(kept, 0, p_ - kept, n_));
    orthonormalize<T>(block_out, random_, context_);
  }

  // ----------------------------------------------------------------------------------- the tiers

  void iterate(const LinearOperator<T>& w, const MatrixRef<const T>* matrix) {
    record_.tier = Tier::dense;
    allocate();
    const bool first = !seeded_;
    if (first) {
      random_.fill(MatrixRef<T>(right_next_));
      orthonormalize<T>(right_next_, random_, context_);
      seeded_ = true;
    } else if (upcoming_.rows() == p_) {
      renew_as(right_next_, upcoming_);
      upcoming_.resize(0, 0);
    }
    sweep(w);
    // Where so much drift leaves no hope, the comparison comes first.
    if (!compares_ || drift_ <= 0.5 * settings_.tolerance * values_[0]) {
      find_errors();
    } else {
      worst_error_ = infinity;
    }
    if (compares_ && !good_enough()) {
      compare_with_origin();
      find_errors();
      // Where it says nothing, the less often it is asked.
      origin_wait_ = good_enough() ? 0 : std::min<std::int64_t>(2 * origin_wait_ + 1, 63);
      origin_due_ = event_ + origin_wait_;
    }
    // One cluster has no directions: those in which it splits are sought when it has moved.
    const bool splits = unsplit_ && squared_norm_ != last_norm_ && p_ < smaller_;
    const bool due =
        splits || (settings_.refresh_every > 0 && event_ % settings_.refresh_every == 0);
    const bool affordable = !std::isfinite(drift_) || credit_ >= 0.0;
    if (first || due || (!good_enough() && affordable)) refresh(w, first);
    if (first) {
      credit_ = 0.0;
      if (matrix != nullptr && !origin_.absent()) know_origin(*matrix);
    }
    for (Index i = 1; i < settings_.max_sweeps && !good_enough() && improvable(); ++i) {
      sweep(w);
      find_errors();
    }
    if (upcoming_.rows() != p_) keep_invariant_block();
    unsplit_ = values_[0] - values_[k_ - 1] <= 1e-10 * values_[0] && k_ > 1;
    last_norm_ = squared_norm_;
  }

  // At the first event W is W_0: what was found bounds its norm.
  void know_origin(MatrixRef<const T> w) {
    if (w.data != origin_.data && (w.map() - origin_.map()).cwiseAbs().maxCoeff() != T(0)) return;
    origin_square_ = squared_norm_;
    origin_norm_ = {values_[0] + record_.errors[0], tails_[0].kind == Completeness::rigorous
                                                        ? Completeness::rigorous
                                                        : Completeness::probabilistic};
  }

  // Whether another sweep would help: residuals, not the tail, make the largest error.
  bool improvable() const {
    const Index j = split();
    return j > 0 && 4.0 * residual(0, j) > worst_error_;
  }

  void refresh(const LinearOperator<T>& w, bool first) {
    if (p_ == smaller_) return;
    record_.refreshed = true;
    ++n_refreshes_;
    Index j = first ? 0 : split();
    for (int round = 0; round < 3; ++round) {
      const double theta = certify(w, j, p_ - j);
      const bool intruder = theta > values_[j] * (1.0 + 1e-9) + slack_;
      if (!intruder && !first) {
        if (space_closed_) replace_guards(j, upcoming_);  // for the next event
        break;
      }
      replace_guards(j, right_next_);
      sweep(w);
      if (!first) {
        // What stood outside is among the tracked now: the bound is for less.
        find_errors();
        if (good_enough() && !(space_closed_ && closed_split_ > j)) break;
      }
      first = false;
      const Index next = space_closed_ ? closed_split_ : split();
      if (next == j) break;
      j = next;
    }
    find_errors();
  }

  void decompose(MatrixRef<const T> w) {
    record_.tier = Tier::full;
    const Index n_vectors = settings_.follow ? p_ : 0;
    Matrix<T> values(1, p_);
    Matrix<T> left(settings_.follow ? m_ : 0, n_vectors),
        right(settings_.follow ? n_ : 0, n_vectors);
    if (factor_ != 1.0) {
      renew_as(enlarged_, static_cast<T>(factor_) * w.map());
      w = enlarged_;
    }
    singular_values<T>(w, MatrixRef<T>(values), MatrixRef<T>(left), MatrixRef<T>(right), context_);
    enlarged_.resize(0, 0);
    for (Index i = 0; i < p_; ++i) values_[i] = static_cast<double>(values(0, i));
    slack_ = rounding_beside(values_[0]);
    for (Index i = 0; i < k_; ++i) record_.errors[i] = slack_;
    record_.completeness = Completeness::rigorous;
    record_.tail = (k_ < p_ ? values_[k_] : (p_ == smaller_ ? 0.0 : values_[k_ - 1])) + slack_;
    drift_ = 0.0;
    if (k_ == smaller_) measure_cluster();
    if (settings_.follow) {
      allocate();
      renew_both(left_next_, left.transpose(), right_next_, right.transpose());
      record_.vector_error = 0.0;
      seeded_ = true;
    }
  }

  // The largest run of equal values: rho.
  void measure_cluster() {
    Index best = 0, size = 0;
    for (Index begin = 0; begin < k_;) {
      Index end = begin + 1;
      while (end < k_ &&
             values_[end - 1] - values_[end] <= settings_.branches.cluster_tolerance * values_[0]) {
        ++end;
      }
      if (end - begin > size) {
        best = begin;
        size = end - begin;
      }
      begin = end;
    }
    if (size < 2) return;
    record_.rho = 0.5 * (values_[best] + values_[best + size - 1]);
    record_.rho_spread = values_[best] - values_[best + size - 1];
    record_.multiplicity = size;
  }

  // A block that W maps into its own image stays as it is: a sweep would only feed rounding along the
  // directions that W stretches most, and lose the least ones. For layers from an orthogonal start it is
  // the subspace in which they move for good.
  void keep_invariant_block() {
    if (residual(0, p_) <= 1e-8 * values_[0] + 4.0 * slack_) renew_as(upcoming_, right_);
  }

  // ------------------------------------------------------------------------------------- records

  void begin_record() {
    record_.event = event_;
    record_.refreshed = false;
    record_.n_columns = 0;
    record_.errors.assign(static_cast<std::size_t>(k_), infinity);
    record_.truncated = 0.0;
    record_.norm = squared_norm_ >= 0.0 ? std::sqrt(squared_norm_) : nan;
    record_.vector_error = nan;
    record_.rho = record_.rho_spread = nan;
    record_.multiplicity = 0;
    record_.left_angles.assign(static_cast<std::size_t>(k_), nan);
    record_.right_angles = record_.left_angles;
    record_.left_block = record_.right_block = {nan, nan};
  }

  void finish_record(Clock::time_point start) {
    if (record_.tier == Tier::dense) bound_vectors();
    std::vector<double> errors(static_cast<std::size_t>(p_), slack_);
    std::copy(record_.errors.begin(), record_.errors.end(), errors.begin());
    for (Index i = k_; i < p_; ++i) errors[i] = k_ > 0 ? errors[k_ - 1] : slack_;
    if (settings_.follow && record_.tier == Tier::factored) {
      follow(core_branches_, errors, MatrixRef<double>(coordinates_left_),
             MatrixRef<double>(coordinates_right_));
      record_.orthogonality = 0.0;
    } else if (settings_.follow) {
      follow(branches_, errors, MatrixRef<T>(left_next_), MatrixRef<T>(right_next_));
      record_.orthogonality = defect(left_next_);
      if (settings_.measure_angles) {
        record_.orthogonality = std::max(record_.orthogonality, defect(right_next_));
      }
    } else {
      record_.branches.assign(static_cast<std::size_t>(k_), -1);
      record_.signs.assign(static_cast<std::size_t>(k_), 1.0);
      record_.clusters = find_clusters(values_, errors, settings_.branches.cluster_tolerance);
      record_.clusters.resize(static_cast<std::size_t>(k_));
      record_.orthogonality = 0.0;
    }
    record_.values.assign(values_.begin(), values_.begin() + k_);
    report_gaps();
    record_.drift = drift_;
    ++event_;
    record_.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }

  template <class S>
  void follow(Branches<S>& branches, const std::vector<double>& errors, MatrixRef<S> left,
              MatrixRef<S> right) {
    branches.follow(values_, errors, last_drift_, left, right, context_);
    if (!branches.has_reference() && p_ > 0 && branches.clusters().back() > 0) {
      branches.set_reference();
    }
    has_vectors_ = true;
    const auto head = [&](auto list) {
      list.resize(static_cast<std::size_t>(k_));
      return list;
    };
    record_.branches = head(branches.ids());
    record_.clusters = head(branches.clusters());
    record_.signs = head(branches.signs());
    const auto overlaps = head(branches.overlaps());
    record_.overlap = *std::min_element(overlaps.begin(), overlaps.end());
    if (!settings_.measure_angles) return;
    record_.left_angles = head(branches.angles(true));
    record_.right_angles = head(branches.angles(false));
    record_.left_block = branches.block_angle(true, k_, context_);
    record_.right_block = branches.block_angle(false, k_, context_);
  }

  void report_gaps() {
    record_.gaps.assign(static_cast<std::size_t>(k_), infinity);
    for (Index i = 0; i < k_; ++i) {
      if (i > 0) record_.gaps[i] = values_[i - 1] - values_[i];
      if (i + 1 < p_) record_.gaps[i] = std::min(record_.gaps[i], values_[i] - values_[i + 1]);
    }
  }

  // Wedin's bound for the pair with the known residual, and how far the reported vectors are from it.
  void bound_vectors() {
    const double separation = pair_values_[k_ - 1] - tails_[k_].value - residual(0, k_);
    if (!(separation > 0.0)) return;
    // left_next_ = rotation^T left_.
    const double left_turn = k_ < p_ ? rotation_.block(k_, 0, p_ - k_, k_).norm() : 0.0;
    Matrix<T> reported = right_next_.topRows(k_);
    const double right_turn = outside(reported, right_, k_);
    record_.vector_error = residual(0, k_) / separation + std::hypot(left_turn, right_turn);
  }

  double defect(const Matrix<T>& x) const {
    Matrix<T> gram(x.rows(), x.rows());
    multiply<T>(top(x, x.rows()), Op::none, top(x, x.rows()), Op::transpose, MatrixRef<T>(gram),
                context_);
    gram.diagonal().array() -= T(1);
    return gram.size() > 0 ? static_cast<double>(gram.cwiseAbs().maxCoeff()) : 0.0;
  }

  // The factor's own powers must be numbers of T.
  static constexpr int limit_exponent = sizeof(T) == 8 ? 1000 : 120;
  double factor_ = 1.0;
  Random random_;
  Branches<T> branches_;
  Context context_;
  Workspace workspace_;
  bool full_ = false, seeded_ = false;
  std::int64_t event_ = 0;

  Matrix<T> left_, right_;  // the pair whose residual is known
  Matrix<T> scratch_, basis_, images_, ritz_;
  Matrix<T> enlarged_;  // of vectors, or of W, times factor_
  Matrix<T> upcoming_;  // to start the next event from, where it has rows
  bool space_closed_ = false;
  Index closed_split_ = 0;  // how many values stood above the shared one
  Matrix<double> rotation_;
  std::vector<double> values_, pair_values_, residual_;
  double last_norm_ = -1.0;
  bool unsplit_ = false;
  double squared_norm_ = -1.0, slack_ = 0.0, worst_error_ = infinity;
  std::vector<Bound> tails_;

  MatrixRef<const T> origin_;  // W_0, the caller's
  Bound origin_norm_;
  double origin_square_ = 0.0, origin_product_ = 0.0;  // ||W_0||_F^2, tr(W^T W_0)
  bool compares_ = false;
  std::int64_t origin_due_ = 0, origin_wait_ = 0;
  Matrix<T> image_;  // u W of the pair
  KnownImage origin_of_left_, origin_of_right_;

  Bound anchor_;  // of M, when it was certified
  Index anchor_rank_ = 0;
  bool anchor_is_pair_ = false;  // nothing has moved since
  Matrix<T> anchor_left_, anchor_right_;
  double anchor_top_ = 0.0, anchor_residual_ = 0.0;
  double drift_ = 0.0, last_drift_ = infinity, credit_ = 0.0;

  Matrix<double> core_left_, core_right_;
  const LowRankDrift<T>* factored_ = nullptr;  // of the last event, if it was one of these
  Branches<double> core_branches_;
  Matrix<double> coordinates_left_, coordinates_right_;
  bool vectors_are_current_ = true;
  Matrix<T> spare_left_, spare_right_;  // vectors outside the frames
  Index spare_frame_ = -1;
  bool spare_is_current_ = false;
};

template <class T>
const TrackerRecord& SvdTracker<T>::Impl::update(const LowRankDrift<T>& drift,
                                                 const Context& context) {
  const auto start = Clock::now();
  require_shape(drift.initial(), m_, n_, "W");
  if (!drift.closed())
    throw std::invalid_argument("the frames of the factored form are not closed");
  context_ = context;
  context_.workspace = &workspace_;
  const Matrix<double> core = drift.core();
  if (std::max(core.rows(), core.cols()) > coordinate_room) {
    throw ShapeError("frames of " + std::to_string(std::max(core.rows(), core.cols())) +
                     " vectors; wanted at most " + std::to_string(coordinate_room));
  }
  const Index inside = std::min(core.rows(), core.cols());
  const Index outside = smaller_ - inside;
  const double rho = std::abs(drift.shrink()) * drift.isometry().scale;
  squared_norm_ = core.squaredNorm() + static_cast<double>(outside) * square(rho);
  begin_record();
  record_.tier = Tier::factored;
  record_.truncated = drift.truncated();
  record_.rho = rho;
  record_.rho_spread = 2.0 * rho * drift.isometry().departure;
  record_.multiplicity = outside;

  std::vector<double> core_values;
  if (inside > 0) {
    const SmallDecomposition d(core, context_);
    renew_both(core_left_, d.a.transpose(), core_right_, d.b.transpose());
    core_values.assign(d.s.data(), d.s.data() + inside);
  }
  // Branches in the coordinates of the frames, which only grow.
  const double top_value =
      std::max(core_values.empty() ? 0.0 : core_values[0], outside > 0 ? rho : 0.0);
  slack_ = rounding_beside(top_value);
  const double error = drift.truncated() + rho * drift.isometry().departure + slack_;

  // In descending order: the values of the core, and those outside.
  struct Item {
    double value;
    Index place;  // in the core, or -1 - (number of the one outside)
  };
  std::vector<Item> items;
  for (Index i = 0; i < inside; ++i) items.push_back({core_values[i], i});
  for (Index i = 0; i < std::min(outside, p_); ++i) items.push_back({rho, -1 - i});
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.value > b.value; });
  // All of them: those outside once more, as often as they are.
  if (k_ > static_cast<Index>(items.size())) {
    const auto after =
        std::find_if(items.begin(), items.end(), [](const Item& item) { return item.place < 0; });
    const auto at = after - items.begin();
    const Index missing = smaller_ - static_cast<Index>(items.size());
    std::vector<Item> more;
    for (Index i = 0; i < missing; ++i) more.push_back({rho, -1 - p_ - i});
    items.insert(items.begin() + at, more.begin(), more.end());
  }
  const Index p = std::min<Index>(p_, static_cast<Index>(items.size()));
  values_.assign(static_cast<std::size_t>(p_), 0.0);
  for (Index i = 0; i < p; ++i) values_[i] = items[i].value;
  for (Index i = 0; i < k_; ++i) record_.errors[i] = error;
  worst_error_ = error;
  const Completeness kind =
      drift.isometry().rigorous ? Completeness::rigorous : Completeness::probabilistic;
  record_.completeness = good_enough() ? kind : Completeness::none;
  record_.tail = (k_ < static_cast<Index>(items.size()) ? items[k_].value : 0.0) + error;
  drift_ = 0.0;

  if (settings_.follow && p_ <= thin_limit) {
    // Vectors in the coordinates of the frames, which only grow, and then of directions outside them that
    // stay the same while the frames do; as vectors of full length only when somebody asks.
    factored_ = &drift;
    spare_is_current_ = spare_is_current_ && spare_frame_ == inside;
    spare_frame_ = inside;
    const Matrix<double> none = Matrix<double>::Zero(p_, coordinate_room + p_);
    renew_both(coordinates_left_, none, coordinates_right_, none);
    const double sign = drift.shrink() < 0.0 ? -1.0 : 1.0;
    for (Index i = 0; i < p; ++i) {
      const Index place = items[i].place;
      if (place >= 0) {
        coordinates_left_.row(i).head(core_left_.cols()) = core_left_.row(place);
        coordinates_right_.row(i).head(core_right_.cols()) = core_right_.row(place);
      } else {
        coordinates_left_(i, coordinate_room - 1 - place) = sign;
        coordinates_right_(i, coordinate_room - 1 - place) = 1.0;
      }
    }
    last_drift_ = infinity;
    vectors_are_current_ = false;
    finish_record(start);
  } else {
    // Values alone, or all of them.
    const bool follow = settings_.follow;
    settings_.follow = false;
    finish_record(start);
    settings_.follow = follow;
  }
  return record_;
}

// The vectors of a factored event at full length.
template <class T>
void SvdTracker<T>::Impl::make_vectors() {
  if (vectors_are_current_ || factored_ == nullptr) return;
  const LowRankDrift<T>& drift = *factored_;
  const MatrixRef<const T> left_frame = drift.left_frame(), right_frame = drift.right_frame();
  allocate();
  const T inverse = static_cast<T>(1.0 / drift.isometry().scale);
  if (!spare_is_current_) {
    const Index n_spare = std::min({p_, n_ - right_frame.rows, m_ - left_frame.rows});
    renew(spare_right_, n_spare, n_);
    renew(spare_left_, n_spare, m_);
    // Chosen on the side where W_0 keeps lengths.
    const bool from_right = n_ <= m_;
    Matrix<T>& chosen = from_right ? spare_right_ : spare_left_;
    Matrix<T>& image = from_right ? spare_left_ : spare_right_;
    const MatrixRef<const T> frame = from_right ? right_frame : left_frame;
    random_.fill(MatrixRef<T>(chosen));
    for (int pass = 0; pass < 2; ++pass) {
      project_out(MatrixRef<T>(chosen), frame);
      orthonormalize<T>(chosen, random_, context_);
    }
    if (from_right) {
      block_times_transpose<T>(MatrixRef<T>(chosen), drift.initial(), MatrixRef<T>(image),
                               context_);
    } else {
      block_times<T>(MatrixRef<T>(chosen), drift.initial(), MatrixRef<T>(image), context_);
    }
    image *= inverse;
    spare_is_current_ = true;
  }
  const auto combine = [&](const Matrix<double>& coordinates, MatrixRef<const T> whole,
                           const Matrix<T>& spare, Matrix<T>& out) {
    // Frames that have grown since the event, perhaps beyond the room, have no part in it.
    const MatrixRef<const T> frame =
        whole.block(0, 0, std::min(whole.rows, coordinate_room), whole.cols);
    const Matrix<T> turn = coordinates.leftCols(frame.rows).template cast<T>();
    const Matrix<T> rest = coordinates.middleCols(coordinate_room, spare.rows()).template cast<T>();
    out.setZero();
    if (frame.rows > 0) {
      multiply<T>(top(turn, p_), Op::none, frame, Op::none, MatrixRef<T>(out), context_);
    }
    if (spare.rows() > 0) {
      multiply<T>(T(1), top(rest, p_), Op::none, top(spare, spare.rows()), Op::none, T(1),
                  MatrixRef<T>(out), context_);
    }
  };
  combine(coordinates_left_, left_frame, spare_left_, left_next_);
  combine(coordinates_right_, right_frame, spare_right_, right_next_);
  vectors_are_current_ = true;
}

template <class T>
SvdTracker<T>::SvdTracker(Index rows, Index cols, const TrackerSettings& settings)
    : impl_(std::make_unique<Impl>(rows, cols, settings)) {}
template <class T>
SvdTracker<T>::~SvdTracker() = default;
template <class T>
SvdTracker<T>::SvdTracker(SvdTracker&&) noexcept = default;

template <class T>
Index SvdTracker<T>::rows() const {
  return impl_->m_;
}
template <class T>
Index SvdTracker<T>::cols() const {
  return impl_->n_;
}
template <class T>
Index SvdTracker<T>::n_values() const {
  return impl_->k_;
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(MatrixRef<const T> w, double drift,
                                           const Context& context) {
  return impl_->update(MatrixOperator<T>(w), &w, drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(const LinearOperator<T>& w, double drift,
                                           const Context& context) {
  return impl_->update(w, nullptr, drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::update(const LowRankDrift<T>& drift, const Context& context) {
  return impl_->update(drift, context);
}
template <class T>
const TrackerRecord& SvdTracker<T>::record() const {
  return impl_->record_;
}
template <class T>
std::int64_t SvdTracker<T>::n_refreshes() const {
  return impl_->n_refreshes_;
}
template <class T>
std::int64_t SvdTracker<T>::n_certificates() const {
  return impl_->n_certificates_;
}
template <class T>
MatrixRef<const T> SvdTracker<T>::left() const {
  if (!impl_->has_vectors_) return {};
  impl_->make_vectors_alone();
  return {impl_->left_next_.data(), impl_->k_, impl_->m_};
}
template <class T>
MatrixRef<const T> SvdTracker<T>::right() const {
  if (!impl_->has_vectors_) return {};
  impl_->make_vectors_alone();
  return {impl_->right_next_.data(), impl_->k_, impl_->n_};
}
template <class T>
void SvdTracker<T>::set_origin(MatrixRef<const T> w) {
  impl_->set_origin(w);
}
template <class T>
void SvdTracker<T>::seed(MatrixRef<const T> right, const Context& context) {
  impl_->seed(right, context);
}
template <class T>
void SvdTracker<T>::set_reference() {
  impl_->set_reference();
}
template <class T>
void SvdTracker<T>::set_reference(MatrixRef<const T> left, MatrixRef<const T> right) {
  impl_->set_reference(left, right);
}

template class SvdTracker<float>;
template class SvdTracker<double>;

}  // namespace dlnfast
