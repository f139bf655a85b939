// SPDX-License-Identifier: MIT
#include "dlnfast/dense_descent.hpp"

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/recorders.hpp"
#include "dlnfast/thin_product.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using Widths = std::vector<Index>;
using Weights = std::vector<Matrix<double>>;

namespace {

struct Problem {
  Widths widths;
  Matrix<double> target, input_gram, input_factor,
      factor_target;  // the last three empty where S = I
  double loss_scale = 0.5;
  double loss_floor = 0.25;
  Rates rates;
  Weights weights;

  Problem(Widths w, bool with_gram, bool with_momentum) : widths(std::move(w)) {
    const Index d_in = widths.front(), d_out = widths.back();
    if (with_gram) {
      // A rank-deficient S near a projector, if it is large enough.
      const Index rank = d_in > 4 ? d_in - 3 : d_in;
      input_factor = Matrix<double>::Identity(d_in, rank) +
                     random_matrix<double>(d_in, rank, 0.5 / std::sqrt(double(d_in)));
      factor_target = random_matrix<double>(d_out, rank);
      input_gram = input_factor * input_factor.transpose();
      target = factor_target * input_factor.transpose();
    } else {
      target = random_matrix<double>(d_out, d_in);
    }
    for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
      const double scale = std::sqrt(3.0 / double(std::max<Index>(1, widths[l])));
      weights.push_back(random_matrix<double>(widths[l + 1], widths[l], 0.9 * scale));
      rates.learning_rate.push_back(0.02 + 0.01 * double(l));
      rates.weight_decay.push_back(l == 1 ? 0.0 : 0.05);
      rates.momentum.push_back(with_momentum && l != 1 ? 0.6 + 0.1 * double(l % 3) : 0.0);
    }
  }

  Index n_layers() const { return static_cast<Index>(weights.size()); }
};

// Reference implementation by the definition.
struct Naive {
  const Problem& problem;
  Weights weights, velocity;

  explicit Naive(const Problem& p) : problem(p), weights(p.weights) {
    for (const auto& w : weights) velocity.push_back(Matrix<double>::Zero(w.rows(), w.cols()));
  }

  // Returns W_{to:from}, layers from 1; the identity if from > to.
  Matrix<double> chain(Index to, Index from) const {
    Matrix<double> m = Matrix<double>::Identity(problem.widths[from - 1], problem.widths[from - 1]);
    for (Index l = from; l <= to; ++l) m = (weights[l - 1] * m).eval();
    return m;
  }
  Matrix<double> error() const {
    const Matrix<double> m = chain(problem.n_layers(), 1);
    if (problem.input_gram.size() == 0) return m - problem.target;
    return m * problem.input_gram - problem.target;
  }
  double loss() const {
    const Matrix<double> m = chain(problem.n_layers(), 1);
    Matrix<double> residual = m - problem.target;
    if (problem.input_gram.size() > 0) residual = m * problem.input_factor - problem.factor_target;
    return 0.5 * problem.loss_scale * residual.squaredNorm() + problem.loss_floor;
  }
  Matrix<double> gradient(Index l) const {
    return problem.loss_scale * chain(problem.n_layers(), l + 1).transpose() * error() *
           chain(l - 1, 1).transpose();
  }
  void step() {
    Weights g;
    for (Index l = 1; l <= problem.n_layers(); ++l) g.push_back(gradient(l));
    for (std::size_t l = 0; l < g.size(); ++l) {
      velocity[l] = problem.rates.momentum[l] * velocity[l] + g[l] +
                    problem.rates.weight_decay[l] * weights[l];
      weights[l] -= problem.rates.learning_rate[l] * velocity[l];
    }
  }
};

// The same problem in precision T, with its stepper.
template <class T>
struct Fast {
  Matrix<T> target, input_gram, input_factor, factor_target;
  std::vector<Matrix<T>> weights;
  Objective<T> objective;
  std::unique_ptr<DenseDescent<T>> descent;

  std::vector<MatrixRef<T>> refs() {
    std::vector<MatrixRef<T>> r;
    for (auto& w : weights) r.emplace_back(w);
    return r;
  }

  Fast(const Problem& p, int n_threads, Index small = 32)
      : target(p.target.template cast<T>()),
        input_gram(p.input_gram.template cast<T>()),
        input_factor(p.input_factor.template cast<T>()),
        factor_target(p.factor_target.template cast<T>()) {
    for (const auto& w : p.weights) weights.push_back(w.template cast<T>());
    objective.target = target;
    objective.input_gram = input_gram;
    objective.input_factor = input_factor;
    objective.factor_target = factor_target;
    objective.loss_scale = p.loss_scale;
    objective.loss_floor = p.loss_floor;
    descent = std::make_unique<DenseDescent<T>>(refs(), objective, p.rates,
                                                Context{n_threads, nullptr}, small);
  }
};

const std::vector<Widths> networks{
    {5, 4},  // one layer
    {4, 1},
    {6, 6, 6, 6},  // square
    {9, 8, 7, 2},  // thin output
    {2, 7, 8, 9},  // thin input
    {8, 3, 9},     // hourglass
    {12, 7, 3, 8, 11},
    {12, 3, 8, 9, 10},  // a bottleneck after the input layer
    {12, 9, 8, 3, 10},  // a bottleneck before the output layer
    {3, 9, 4},          // bulge
    {5, 12, 13, 12, 6},
    {1, 1, 1},
    {7, 1, 7},
    {1, 9, 9, 1},
    {17, 64, 65, 17},
    {40, 41, 42, 5},
    {5, 40, 41, 42},
    {40, 41, 5, 42, 43},
    // Too wide for the thin kernels, with every kind of pivot.
    {66, 80, 90, 85},
    {85, 90, 80, 66},
    {90, 66, 90, 90},
    {90, 90, 66, 90},
    {66, 66},
    {66, 66, 66},
    // Nothing flows through an empty layer.
    {3, 0, 2},
    {0, 3, 2},
    {3, 2, 0},
    {3, 5, 0, 4, 2},
};

std::string name(const Widths& widths) {
  std::string text;
  for (const Index d : widths) text += " " + std::to_string(d);
  return text;
}

template <class T>
void same_iterates() {
  for (const Widths& widths : networks) {
    const int failures = check::failures;
    const Index widest = *std::max_element(widths.begin(), widths.end());
    const int steps = widest > 60 ? 4 : 12;
    for (int variant = 0; variant < 4; ++variant) {
      const Problem problem(widths, variant % 2 == 1, variant / 2 == 1);
      // Narrow networks with both kernels: in the padded copy, if it is used, and in place.
      for (const auto& [n_threads, small] : {std::pair(1, 32), {1, 0}, {2, 0}, {7, 0}}) {
        Naive naive(problem);
        Fast<T> fast(problem, n_threads, small);
        // Rates and norms keep the growth of an error per step near 1; 4 covers it.
        const double allowed = check::tolerance<T>(widest, 4.0 * steps);
        for (int t = 0; t <= steps; ++t) {
          const double loss = naive.loss();
          CHECK_NEAR(fast.descent->evaluate(), loss, allowed * (1.0 + std::abs(loss)));
          for (std::size_t l = 0; l < fast.weights.size(); ++l) {
            CHECK_NEAR(distance(fast.descent->weights()[l].map(), naive.weights[l]), 0.0, allowed);
          }
          fast.descent->update();
          naive.step();
        }
        if (widest > 60 && n_threads == 2) break;
      }
    }
    if (check::failures > failures) std::fprintf(stderr, "  widths%s\n", name(widths).c_str());
  }
}

void gradients_match_finite_differences() {
  for (const Widths& widths : networks) {
    if (*std::max_element(widths.begin(), widths.end()) > 20) continue;
    for (const bool with_gram : {false, true}) {
      Problem problem(widths, with_gram, false);
      // With rate 1 and no decay, a step is the gradient itself.
      for (auto& r : problem.rates.learning_rate) r = 1.0;
      for (auto& d : problem.rates.weight_decay) d = 0.0;
      Fast<double> stepped(problem, 1), fast(problem, 1, 0);
      stepped.descent->evaluate();
      stepped.descent->update();
      stepped.descent->weights();
      for (std::size_t l = 0; l < fast.weights.size(); ++l) {
        Matrix<double>& w = fast.weights[l];
        for (Index e = 0; e < w.size(); e += 1 + w.size() / 10) {
          const double old = w.data()[e], h = 1e-5;
          w.data()[e] = old + h;
          const double above = fast.descent->evaluate();
          w.data()[e] = old - h;
          const double below = fast.descent->evaluate();
          w.data()[e] = old;
          // Truncation h^2 and rounding eps / h, both near 1e-10, times a loss of order 10.
          CHECK_NEAR(old - stepped.weights[l].data()[e], (above - below) / (2 * h), 1e-7);
        }
      }
    }
  }
}

// In both precisions and on any team, with read-only weights.
template <class T>
void compute_gradients_matches_reference() {
  for (const Widths& widths : networks) {
    const int failures = check::failures;
    for (const bool with_gram : {false, true}) {
      const Problem problem(widths, with_gram, false);
      const Naive naive(problem);
      const Index widest = *std::max_element(widths.begin(), widths.end());
      const double allowed = check::tolerance<T>(widest, 4.0);
      Fast<T> fast(problem, 1);
      std::vector<MatrixRef<const T>> weights;
      for (const auto& w : fast.refs()) weights.push_back(w);
      std::vector<Matrix<T>> first;
      for (const int n_threads : {1, 2, 7}) {
        std::vector<Matrix<T>> gradients;
        std::vector<MatrixRef<T>> refs;
        for (const auto& w : weights) {
          gradients.push_back(Matrix<T>::Constant(w.rows, w.cols, T(7)));
        }
        for (auto& g : gradients) refs.emplace_back(g);
        const double loss =
            compute_gradients<T>(weights, fast.objective, refs, Context{n_threads, nullptr});
        CHECK_NEAR(loss, naive.loss(), allowed * (1.0 + naive.loss()));
        for (std::size_t l = 0; l < gradients.size(); ++l) {
          const Matrix<double> wanted = naive.gradient(static_cast<Index>(l) + 1);
          CHECK_NEAR(distance(gradients[l], wanted), 0.0, allowed * (1.0 + wanted.norm()));
          CHECK(fast.weights[l] == problem.weights[l].template cast<T>());
          if (n_threads > 1) CHECK(gradients[l] == first[l]);
        }
        if (n_threads == 1) first = gradients;
      }
    }
    if (check::failures > failures) std::fprintf(stderr, "  widths%s\n", name(widths).c_str());
  }
  const Problem problem({3, 4, 2}, false, false);
  Fast<T> fast(problem, 1);
  const std::vector<MatrixRef<const T>> weights{fast.weights[0], fast.weights[1]};
  Matrix<T> a(4, 3), b(2, 4);
  const auto call = [&](std::vector<MatrixRef<T>> gradients) {
    return compute_gradients<T>(weights, fast.objective, gradients, Context{1, nullptr});
  };
  CHECK_THROWS(call({a}), ShapeError);
  CHECK_THROWS(call({b, a}), ShapeError);
  fast.objective.target = a;
  CHECK_THROWS(call({a, b}), ShapeError);
}

void pivots_are_cheapest() {
  std::set<std::string> kinds;
  for (const Widths& widths : networks) {
    const Index n_layers = static_cast<Index>(widths.size()) - 1;
    const Index p = best_pivot(widths);
    CHECK(p >= 0 && p <= n_layers);
    for (Index q = 0; q <= n_layers; ++q) CHECK(step_flops(widths, p) <= step_flops(widths, q));
    kinds.insert(std::string(p == 0          ? "input"
                             : p == n_layers ? "output"
                                             : "inside") +
                 (widths[p] <= thin_limit ? ", thin" : ""));
  }
  CHECK(kinds.size() == 6);  // the networks above cover every path
  for (Index p = 0; p <= 3; ++p) CHECK(step_flops({9, 9, 9, 9}, p) == 6.0 * 2 * 9 * 9 * 9);
  CHECK(best_pivot({9, 9, 9, 9}) == 3);
  CHECK(best_pivot({9, 9, 9, 2}) == 3);
  CHECK(best_pivot({2, 9, 9, 9}) == 0);
  CHECK(best_pivot({9, 2, 9, 9}) == 1);  // same cost as 3, and thin
  CHECK(best_pivot({9, 2, 9}) == 1);
  // 6 flops per entry of W_1 and row, as documented.
  CHECK(step_flops({2048, 2048, 2048, 10}, 3) == 6.0 * 10 * 2 * 2048 * 2048);
  CHECK_THROWS(best_pivot({}), ShapeError);
  CHECK_THROWS(best_pivot({4}), ShapeError);
  CHECK_THROWS(step_flops({4, 5}, 2), ShapeError);
  CHECK_THROWS(step_flops({4, 5}, -1), ShapeError);
}

// The result of a step does not depend on the team.
template <class T>
void results_do_not_depend_on_team() {
  for (const Widths& widths : {Widths{300, 300, 7}, Widths{7, 300, 300}, Widths{300, 7, 300},
                               Widths{300, 1, 300}, Widths{300, 200, 300}, Widths{129, 300, 259}}) {
    const Problem problem(widths, false, true);
    Fast<T> single(problem, 1);
    double loss = 0.0;
    for (int t = 0; t < 3; ++t) {
      loss = single.descent->evaluate();
      single.descent->update();
    }
    for (const int n_threads : {0, 2, 3, 7}) {
      Fast<T> many(problem, n_threads);
      double same = 0.0;
      for (int t = 0; t < 3; ++t) {
        same = many.descent->evaluate();
        many.descent->update();
      }
      CHECK(same == loss);
      for (std::size_t l = 0; l < single.weights.size(); ++l) {
        CHECK(single.weights[l] == many.weights[l]);
      }
    }
  }
}

void finds_the_layer_that_diverged() {
  const Problem problem({3, 4, 5, 2}, false, false);
  Fast<double> fast(problem, 1, 0);
  fast.weights[1](2, 2) = -50.0;
  CHECK(largest_layer(*fast.descent) == 2);
  fast.weights[2](0, 0) = std::numeric_limits<double>::quiet_NaN();
  CHECK(largest_layer(*fast.descent) == 3);
  CHECK(!std::isfinite(fast.descent->evaluate()));
}

void recorder_stores_records() {
  const Problem problem({5, 4, 3}, false, false);
  Fast<double> fast(problem, 1);
  const Index n_values[] = {2, 3};
  std::vector<double> values[2], left[2], right[2], snapshots[2];
  std::vector<double> errors[2], signs[2], tracking[2];
  std::vector<std::int64_t> branches[2], clusters[2];
  std::int64_t n_snapshots = 0;
  DenseRecords<double> records;
  for (int l = 0; l < 2; ++l) {
    const Matrix<double>& w = fast.weights[l];
    values[l].resize(3 * n_values[l]);
    left[l].resize(3 * w.rows() * n_values[l]);
    right[l].resize(3 * w.cols() * n_values[l]);
    snapshots[l].resize(2 * w.size());
    for (auto* list : {&errors[l], &signs[l]}) list->resize(3 * n_values[l]);
    for (auto* list : {&branches[l], &clusters[l]}) list->resize(3 * n_values[l]);
    tracking[l].resize(3 * n_tracking_columns);
    records.values.push_back({values[l].data(), {3, n_values[l]}});
    records.errors.push_back({errors[l].data(), {3, n_values[l]}});
    records.signs.push_back({signs[l].data(), {3, n_values[l]}});
    records.branches.push_back({branches[l].data(), {3, n_values[l]}});
    records.clusters.push_back({clusters[l].data(), {3, n_values[l]}});
    records.tracking.push_back({tracking[l].data(), {3, n_tracking_columns}});
    records.left.push_back({left[l].data(), {3, w.rows(), n_values[l]}});
    records.right.push_back({right[l].data(), {3, w.cols(), n_values[l]}});
    records.snapshots.push_back({snapshots[l].data(), {2, w.rows(), w.cols()}});
  }
  records.snapshot_every = 3;
  records.n_snapshots = &n_snapshots;
  Schedule schedule;
  schedule.steps = 4;
  schedule.record_every = 3;
  CHECK(n_records(schedule) == 3);
  DenseRecorder<double> recorder(*fast.descent, records, Tracking<double>{}, fast.objective,
                                 problem.rates, schedule, Context{1, nullptr});
  std::vector<double> loss(5);
  std::vector<std::int64_t> steps(3);
  std::int64_t n_losses = 0, n_recorded = 0;
  Monitor monitor;
  const Progress progress{loss.data(), steps.data(), &n_losses, &n_recorded};
  const Result result = descend(*fast.descent, recorder, schedule, progress, monitor);
  CHECK(result.outcome == Outcome::finished && result.step == 4);
  CHECK(n_losses == 5 && n_recorded == 3 && n_snapshots == 2);
  CHECK((steps == std::vector<std::int64_t>{0, 3, 4}));

  Naive naive(problem);
  for (int t = 0; t <= 4; ++t) {
    CHECK_NEAR(loss[t], naive.loss(), 1e-12);
    for (int l = 0; l < 2; ++l) {
      const Matrix<double>& w = naive.weights[l];
      if (t % 3 == 0) {
        const MatrixRef<double> snapshot(snapshots[l].data() + t / 3 * w.size(), w.rows(),
                                         w.cols());
        CHECK_NEAR(distance(snapshot.map(), w), 0.0, 1e-13);
      }
      const auto record = std::find(steps.begin(), steps.end(), t) - steps.begin();
      if (record == 3) continue;
      const MatrixRef<double> u(left[l].data() + record * w.rows() * n_values[l], w.rows(),
                                n_values[l]);
      const MatrixRef<double> v(right[l].data() + record * w.cols() * n_values[l], w.cols(),
                                n_values[l]);
      const Matrix<double> wv = w * v.map();
      for (Index i = 0; i < n_values[l]; ++i) {
        const double s = values[l][record * n_values[l] + i];
        CHECK_NEAR((wv.col(i) - s * u.map().col(i)).norm(), 0.0, 1e-13);
        CHECK_NEAR(u.map().col(i).norm(), 1.0, 1e-13);
      }
    }
    naive.step();
  }
}

// `store` writes the complete state: a stepper that starts from it takes the same steps, bit for
// bit.
template <class T>
void check_resume(const Widths& widths, bool momentum, bool adaptive) {
  Problem p(widths, false, momentum);
  if (adaptive) {
    AdaptiveRate adaptive_rate;
    adaptive_rate.safety = 1.5;
    adaptive_rate.curvature.assign(p.weights.size(), 1.0);
    p.rates.adaptive = adaptive_rate;
  }
  const auto state_of = [&](std::vector<Matrix<T>>& velocity, std::vector<Matrix<T>>& compensation,
                            std::vector<std::vector<T>>& vectors) {
    OptimizerState<T> state;
    for (const auto& w : p.weights) {
      velocity.push_back(Matrix<T>::Zero(w.rows(), w.cols()));
      compensation.push_back(Matrix<T>::Zero(w.rows(), w.cols()));
      vectors.emplace_back(static_cast<std::size_t>(w.cols()), T(0));
    }
    for (std::size_t l = 0; l < p.weights.size(); ++l) {
      if (momentum) state.velocity.emplace_back(velocity[l]);
      if (*std::max_element(widths.begin(), widths.end()) <= 32) {
        state.compensation.emplace_back(compensation[l]);
      }
      if (adaptive) {
        state.power_vectors.push_back({vectors[l].data(), {static_cast<Index>(vectors[l].size())}});
      }
    }
    return state;
  };
  std::vector<Matrix<T>> velocity, compensation, weights;
  std::vector<std::vector<T>> vectors;
  Fast<T> fast(p, 1);
  const OptimizerState<T> state = state_of(velocity, compensation, vectors);
  DenseDescent<T> first(fast.refs(), fast.objective, p.rates, Context{1, nullptr}, 32, state);
  std::vector<double> losses;
  for (int t = 0; t < 9; ++t) {
    losses.push_back(first.evaluate());
    if (t == 4) {
      first.store();
      weights = fast.weights;
    }
    // Further steps do not change the stored state.
    first.update();
  }
  first.store();
  std::vector<Matrix<T>> velocity_end = velocity, compensation_end = compensation, again_velocity,
                         again_compensation;
  std::vector<std::vector<T>> again_vectors;
  // Repeat the steps up to the fifth, for the state at that step.
  Fast<T> other(p, 1);
  const OptimizerState<T> resumed_state =
      state_of(again_velocity, again_compensation, again_vectors);
  DenseDescent<T> short_run(other.refs(), other.objective, p.rates, Context{1, nullptr}, 32,
                            resumed_state);
  for (int t = 0; t < 4; ++t) {
    short_run.evaluate();
    short_run.update();
  }
  short_run.evaluate();
  short_run.store();
  for (std::size_t l = 0; l < weights.size(); ++l) CHECK(other.weights[l] == weights[l]);
  DenseDescent<T> second(other.refs(), other.objective, p.rates, Context{1, nullptr}, 32,
                         resumed_state);
  for (int t = 4; t < 9; ++t) {
    CHECK(second.evaluate() == losses[static_cast<std::size_t>(t)]);
    second.update();
  }
  second.store();
  for (std::size_t l = 0; l < weights.size(); ++l) {
    CHECK(other.weights[l] == fast.weights[l]);
    CHECK(again_velocity[l] == velocity_end[l] && again_compensation[l] == compensation_end[l]);
  }
}

void runs_resume() {
  for (const Widths& widths : {Widths{6, 6, 6, 6},
                               {9, 8, 7, 2},
                               {32, 31, 32},
                               {40, 41, 42, 5},
                               {66, 80, 90, 85},
                               {3, 5, 0, 4, 2}}) {
    for (const bool momentum : {false, true}) {
      for (const bool adaptive : {false, true}) {
        check_resume<double>(widths, momentum, adaptive);
        check_resume<float>(widths, momentum, adaptive);
      }
    }
  }
  Problem p({4, 3, 2}, false, true);
  Fast<double> fast(p, 1);
  Matrix<double> wrong(3, 3);
  OptimizerState<double> state;
  state.velocity = {wrong, wrong};
  const auto build = [&] {
    DenseDescent<double>(fast.refs(), fast.objective, p.rates, Context{1, nullptr}, 32, state);
  };
  CHECK_THROWS(build(), ShapeError);
  state.velocity.pop_back();
  CHECK_THROWS(build(), ShapeError);
}

void sizes_are_checked() {
  const Problem problem({3, 4, 2}, true, false);
  Matrix<double> w1(4, 3), w2(2, 4), target(2, 3), factor(3, 3), narrow(3, 2), wrong(3, 4), none;
  Objective<double> good;
  good.target = target;
  const auto build = [](std::vector<MatrixRef<double>> weights, const Objective<double>& objective,
                        const Rates& rates) {
    DenseDescent<double>(std::move(weights), objective, rates, Context{});
  };
  build({w1, w2}, good, problem.rates);
  CHECK_THROWS(build({}, good, problem.rates), ShapeError);
  CHECK_THROWS(build({w2, w1}, good, problem.rates), ShapeError);
  CHECK_THROWS(build({w1, wrong}, good, problem.rates), ShapeError);
  CHECK_THROWS(build({w1}, good, problem.rates), ShapeError);
  Objective<double> o = good;
  o.target = wrong;
  CHECK_THROWS(build({w1, w2}, o, problem.rates), ShapeError);
  o.target = none;
  CHECK_THROWS(build({w1, w2}, o, problem.rates), ShapeError);
  o = good;
  o.input_gram = factor;
  CHECK_THROWS(build({w1, w2}, o, problem.rates), ShapeError);  // without input_factor
  o.input_factor = factor;
  CHECK_THROWS(build({w1, w2}, o, problem.rates), ShapeError);  // without factor_target
  o.factor_target = target;
  build({w1, w2}, o, problem.rates);
  for (Matrix<double>* bad : {&narrow, &wrong}) {
    o.input_factor = *bad;
    CHECK_THROWS(build({w1, w2}, o, problem.rates), ShapeError);
  }
  for (auto list : {&Rates::learning_rate, &Rates::weight_decay, &Rates::momentum}) {
    Rates rates = problem.rates;
    (rates.*list).pop_back();
    CHECK_THROWS(build({w1, w2}, good, rates), ShapeError);
    (rates.*list).resize(3);
    CHECK_THROWS(build({w1, w2}, good, rates), ShapeError);
  }
}

}  // namespace

int main() {
  same_iterates<double>();
  same_iterates<float>();
  gradients_match_finite_differences();
  compute_gradients_matches_reference<float>();
  compute_gradients_matches_reference<double>();
  pivots_are_cheapest();
  results_do_not_depend_on_team<double>();
  results_do_not_depend_on_team<float>();
  finds_the_layer_that_diverged();
  recorder_stores_records();
  runs_resume();
  sizes_are_checked();
  return check::result();
}
