// SPDX-License-Identifier: MIT
// The step loop of gradient descent, independent of the engine that computes a step.
//
// The model is W_{L:1} = W_L ... W_1 with loss c/2 ||W F - G||_F^2 + floor, where S = F F^T and Phi
// = G F^T. F has as many columns as S has rank; F = 1 and G = Phi if S = 1. This loss is a sum of
// squares and hence free of cancellation, and components of W outside the range of S do not enter
// it. All layers are updated together:
//   V_l <- momentum_l V_l + G_l + weight_decay_l W_l,   W_l <- W_l - learning_rate_l V_l,
//   G_l  = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T .
// If only some entries of Phi, or linear measurements y = B vec(M*), are known, the loss is c/2
// ||Omega * (W - Phi)||^2 or c/2 ||B vec(W) - y||^2, and its gradient with respect to W replaces
// W_{L:1} S - Phi. (The gradient uses W S - Phi rather than (W F - G) F^T, because F is less
// accurate than Phi along eigenvectors of S with small eigenvalues.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "dlnfast/array.hpp"
#include "dlnfast/completion.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/reflection.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// The training problem: sufficient statistics of the data, or observations of the matrix itself.
template <class T>
struct Objective {
  MatrixRef<const T> target;      // Phi, d_L x d_0; absent with `observed` or `measured`
  MatrixRef<const T> input_gram;  // S, d_0 x d_0; absent: the identity
  // F, d_0 x r with r <= d_0, and G, d_L x r; required together with input_gram.
  MatrixRef<const T> input_factor, factor_target;
  double loss_scale = 1.0;  // c
  double loss_floor = 0.0;  // minimum of the loss over all W
  std::optional<ObservedEntries<T>> observed;
  std::optional<Measurements<T>> measurements;
  DLNFAST_FIELDS("Objective", target, input_gram, input_factor, factor_target, loss_scale,
                 loss_floor, observed, measurements)

  bool has_target() const { return !observed && !measurements; }
};

// Throws ShapeError unless the statistics fit a network from d_in inputs to d_out outputs.
template <class T>
void check_statistics(const Objective<T>& objective, Index d_out, Index d_in) {
  require_shape(objective.target, d_out, d_in, "target");
  if (objective.input_gram.absent()) return;
  const Index rank = std::min(objective.input_factor.cols, d_in);
  require_shape(objective.input_gram, d_in, d_in, "input_gram");
  require_shape(objective.input_factor, d_in, rank, "input_factor");
  require_shape(objective.factor_target, d_out, rank, "factor_target");
}

// Learning rates that adapt to the weights: each step multiplies learning_rate_l by
//   eta = (1 - mu) safety / (c sum_l m_l q_l s_l^2 + c max_l sum_{k != l} sqrt(m_l m_k) s_lk e + lambda),
// with mu the largest momentum, lambda the largest m_l weight_decay_l, m_l = learning_rate_l, s_l
// (s_lk) the product of the largest singular values of all layers but l (and k), and e a bound on
// the norm of the gradient of the loss with respect to W_{L:1}, divided by c. In the metric of the
// rates, the first sum bounds the Gauss-Newton part of the Hessian, the second the part due to the
// residual. Gradient descent is stable for safety < 2. Power iteration estimates the largest
// singular values; each step continues from the vectors of the previous one.
struct AdaptiveRate {
  double safety = 0.0;            // 0: rates are constant
  std::vector<double> curvature;  // q_l: 1 if all of Phi is known
  double error_scale = 1.0;       // e / sqrt(2 (loss - floor) / c)
  DLNFAST_FIELDS("AdaptiveRate", safety, curvature, error_scale)
};

// State of the optimizer that a resumed run needs in addition to the weights: arrays of the caller,
// read at the start and written by Stepper::store. With an empty list the state starts from zeros
// and is not stored.
template <class T>
struct OptimizerState {
  std::vector<MatrixRef<T>> velocity;         // of the shapes of the weights
  std::vector<MatrixRef<T>> compensation;     // of Kahan sums (small_descent.cpp)
  std::vector<ArrayRef<T, 1>> power_vectors;  // d_{l-1}: of AdaptiveRate; zeros: start at random
  std::vector<MatrixRef<double>> left_factors, right_factors;  // P_l and Q_l of shampoo, epsilon 1
                                                               // at the start
  DLNFAST_FIELDS("OptimizerState", velocity, compensation, power_vectors, left_factors,
                 right_factors)
};

// Throws ShapeError unless the arrays fit the weights.
template <class T>
void check_state(const OptimizerState<T>& state, const std::vector<MatrixRef<T>>& weights) {
  const Index n = static_cast<Index>(weights.size());
  const auto check = [&](const std::vector<MatrixRef<T>>& list, const std::string& name) {
    if (list.empty()) return;
    require_length(static_cast<Index>(list.size()), n, name);
    for (std::size_t l = 0; l < list.size(); ++l) {
      require_shape(list[l], weights[l].rows, weights[l].cols,
                    name + "[" + std::to_string(l) + "]");
    }
  };
  check(state.velocity, "velocity");
  check(state.compensation, "compensation");
  const auto check_factors = [&](const std::vector<MatrixRef<double>>& list, bool of_rows,
                                 const std::string& name) {
    if (list.empty()) return;
    require_length(static_cast<Index>(list.size()), n, name);
    for (std::size_t l = 0; l < list.size(); ++l) {
      const Index side = of_rows ? weights[l].rows : weights[l].cols;
      require_shape(list[l], side, side, name + "[" + std::to_string(l) + "]");
    }
  };
  check_factors(state.left_factors, true, "left_factors");
  check_factors(state.right_factors, false, "right_factors");
  if (state.power_vectors.empty()) return;
  require_length(static_cast<Index>(state.power_vectors.size()), n, "power_vectors");
  for (std::size_t l = 0; l < weights.size(); ++l) {
    require_length(state.power_vectors[l].shape[0], weights[l].cols,
                   "power_vectors[" + std::to_string(l) + "]");
  }
}

// An update rule other than gradient descent. With the gradient G_l, a velocity V_l(0) = 0
// and the functions of singular values polar(U diag(s) V^T) = U V^T:
//   nesterov  D = G + weight_decay W;  V <- momentum V + D;  W <- W - learning_rate (D + momentum V)
//   muon      V <- momentum V + (1 - momentum) G;  D = momentum V + (1 - momentum) G with `nesterov`,
//             otherwise D = V;  W <- (1 - learning_rate weight_decay) W - learning_rate q polar(D),
//             with q the direction_scale of the layer and polar exact, or by Newton-Schulz iteration
//   shampoo   P <- decay P + G G^T, Q <- decay Q + G^T G from P = Q = epsilon 1;
//             V <- momentum V + P^(-1/4) G Q^(-1/4);
//             W <- (1 - learning_rate weight_decay) W - learning_rate V
enum class Rule { nesterov, muon, shampoo };
inline constexpr const char* rule_names[] = {"nesterov", "muon", "shampoo"};
constexpr auto& names_of(Rule) { return rule_names; }

enum class PolarMethod { exact, newton_schulz };
inline constexpr const char* polar_method_names[] = {"polar", "newton-schulz"};
constexpr auto& names_of(PolarMethod) { return polar_method_names; }

// Newton-Schulz: X = D / max(||D||_F, epsilon), then X <- a X + b X X^T X + c X (X^T X)^2
// `iterations` times. The exact polar factor leaves out singular values of at most rank_tolerance
// times the largest one.
struct Optimizer {
  Rule rule = Rule::nesterov;
  bool nesterov = false;
  PolarMethod method = PolarMethod::newton_schulz;
  Index iterations = 5;
  std::vector<double> coefficients{3.4445, -4.775, 2.0315};  // a, b, c
  double epsilon = 1e-7;
  double decay = 1.0;
  std::vector<double> direction_scale;  // q of each layer, for muon
  double rank_tolerance = 0.0;
  DLNFAST_FIELDS("Optimizer", rule, nesterov, method, iterations, coefficients, epsilon, decay,
                 direction_scale, rank_tolerance)
};

// Hyperparameters of every step. Row t has those of step t, in one column for all layers or in one
// for each. Absent tables: the hyperparameters are constant.
struct RateTables {
  MatrixRef<const double> learning_rate_table, weight_decay_table, momentum_table;
  DLNFAST_FIELDS("RateTables", learning_rate_table, weight_decay_table, momentum_table)
};

// Hyperparameters with one value per layer, and the update rule.
struct Rates {
  std::vector<double> learning_rate;
  std::vector<double> weight_decay;
  std::vector<double> momentum;
  AdaptiveRate adaptive;
  RateTables tables;
  std::optional<Optimizer> optimizer;  // absent: gradient descent
  DLNFAST_FIELDS("Rates", learning_rate, weight_decay, momentum, adaptive, tables, optimizer)

  bool is_scheduled() const {
    return !tables.learning_rate_table.absent() || !tables.weight_decay_table.absent() ||
           !tables.momentum_table.absent();
  }

  double learning_rate_at(Index step, Index layer) const {
    return value_at(tables.learning_rate_table, learning_rate, step, layer);
  }
  double weight_decay_at(Index step, Index layer) const {
    return value_at(tables.weight_decay_table, weight_decay, step, layer);
  }
  double momentum_at(Index step, Index layer) const {
    return value_at(tables.momentum_table, momentum, step, layer);
  }

  // The same constant rates without momentum, weight decay and rule, for gradients alone.
  Rates for_gradients() const {
    Rates plain;
    plain.learning_rate = learning_rate;
    plain.weight_decay = plain.momentum = std::vector<double>(learning_rate.size(), 0.0);
    return plain;
  }

  // Writes the hyperparameters of a step that change: out[i] is that of layer layer_of(i).
  template <class T, class LayerOf>
  static void read_row(const MatrixRef<const double>& table, Index step, std::vector<T>& out,
                       const LayerOf& layer_of) {
    if (table.absent()) return;
    const double* row = table.row(step);
    const bool is_common = table.cols == 1;
    for (std::size_t i = 0; i < out.size(); ++i)
      out[i] = static_cast<T>(row[is_common ? 0 : layer_of(i)]);
  }

  // Whether a hyperparameter of a layer is not zero at some step.
  bool has_learning_rate(Index layer) const {
    return any_at(tables.learning_rate_table, learning_rate, layer);
  }
  bool has_weight_decay(Index layer) const {
    return any_at(tables.weight_decay_table, weight_decay, layer);
  }
  bool has_momentum(Index layer) const { return any_at(tables.momentum_table, momentum, layer); }
  bool any_momentum() const {
    for (std::size_t l = 0; l < momentum.size(); ++l) {
      if (has_momentum(static_cast<Index>(l))) return true;
    }
    return false;
  }

 private:
  static double value_at(const MatrixRef<const double>& table, const std::vector<double>& constant,
                         Index step, Index layer) {
    if (table.absent() || table.rows == 0) return constant[static_cast<std::size_t>(layer)];
    return table.row(step)[table.cols == 1 ? 0 : layer];
  }
  static bool any_at(const MatrixRef<const double>& table, const std::vector<double>& constant,
                     Index layer) {
    if (table.absent()) return constant[static_cast<std::size_t>(layer)] != 0.0;
    for (Index t = 0; t < table.rows; ++t) {
      if (table.row(t)[table.cols == 1 ? 0 : layer] != 0.0) return true;
    }
    return false;
  }
};

struct Schedule {
  Index steps = 0;
  Index record_every = 1;
  double tolerance = -1.0;  // stop at a loss of at most this value
  Index first = 0;          // number of the first step; it is recorded
  // Steps between two calls of Monitor::flush, which must empty the record buffers; 0: never.
  Index flush_every = 0;
  DLNFAST_FIELDS("Schedule", steps, record_every, tolerance, first, flush_every)
};

enum class Outcome { finished, converged, stopped, diverged };
inline constexpr const char* outcome_names[] = {"finished", "converged", "stopped", "diverged"};
constexpr auto& names_of(Outcome) { return outcome_names; }

struct Result {
  Outcome outcome;
  Index step;   // last step with a finite loss; if diverged, the first step without one
  Index layer;  // counted from 1; 0 unless diverged
};

// Indices into the caller's array of counts. The last entry is 0 if an exception interrupted a
// step, otherwise 1.
enum Count : Index {
  count_losses,
  count_records,
  count_snapshots,
  count_rates,
  count_between_steps,
  n_counts
};
inline constexpr const char* count_names[n_counts] = {"losses", "records", "snapshots", "rates",
                                                      "between_steps"};

// Buffers and counts that the caller may read while the loop runs, or after an exception. Counts
// start at zero; a flush resets them to zero.
struct Progress {
  double* loss = nullptr;                // n_losses(schedule) values
  std::int64_t* record_steps = nullptr;  // n_records(schedule) values
  std::int64_t* n_losses = nullptr;
  std::int64_t* n_records = nullptr;
  double* rate = nullptr;  // one value of Stepper::rate per step, or null
  std::int64_t* n_rates = nullptr;
  std::int64_t* between_steps = nullptr;  // 0 if an exception interrupted a step, otherwise 1
};

// Arrays of the caller for a run's progress.
struct ProgressArrays {
  ArrayRef<double, 1> loss;
  ArrayRef<double, 1> rate;  // only where rates are adaptive
  ArrayRef<std::int64_t, 1> record_steps, counts;
  DLNFAST_FIELDS("ProgressArrays", loss, rate, record_steps, counts)
};

// Numbers of records and losses to allocate for a whole run, or for the steps between two flushes.
// The run records its first step, multiples of record_every, and its last step.
Index n_records(const Schedule& schedule);
Index n_losses(const Schedule& schedule);
// As n_records, for records at multiples of `every` only.
Index n_multiples(const Schedule& schedule, Index every);

// Sets the counts to zero. Throws ShapeError where an array is too small for the run, or a table of
// rates does not have one row for each step.
Progress start_progress(const ProgressArrays& arrays, const Schedule& schedule, const Rates& rates);

// Networks up to this width are computed in registers and the first-level cache, with compensated
// sums.
inline constexpr Index small_limit = 32;

// One run: its weights at the current step, and the computation of a step.
class Stepper {
 public:
  virtual ~Stepper() = default;
  // Computes the loss at the current weights, and prepares `update`.
  virtual double evaluate() = 0;
  // Whether hyperparameters change from step to step. Then `set_step` precedes each update.
  virtual bool is_scheduled() const { return false; }
  // Sets the hyperparameters of the next update, that of step `step`.
  virtual void set_step(Index /*step*/) {}
  // Updates the weights by one step, from the state of the last `evaluate`.
  virtual void update() = 0;
  virtual Index n_layers() const = 0;
  // Largest absolute entry of layer `layer` (from 0), as largest_magnitude.
  virtual double largest_entry(Index layer) const = 0;
  // Factor of all learning rates in the step that `evaluate` prepared.
  virtual double rate() const { return 1.0; }
  // Writes weights and optimizer state to the caller's arrays.
  virtual void store() {}
  // Largest number of steps between two polls for interrupts.
  virtual Index steps_per_poll() const { return 1; }
};

// Throws ShapeError unless a family (reduced_descent.hpp) of these layers fits a network of
// n_layers layers.
void require_layers(Index first, Index length, Index n_layers);

// Returns the layer, counted from 1, that has the largest entry.
Index largest_layer(const Stepper& stepper);

// Returns the largest absolute entry of a matrix; infinity if an entry is not finite.
template <class T>
double largest_magnitude(MatrixRef<const T> m);

// Stores the records of a run.
class Recorder {
 public:
  virtual ~Recorder() = default;
  virtual void record(Index record, Index step) = 0;
  // Called once per step, after `record` if that step is recorded. Unless this step is the last, an
  // update of the weights follows.
  virtual void after_step(Index /*step*/, double /*loss*/, bool /*last*/) {}
};

// Runs all steps of the schedule. With flush_every > 0, `stepper.store()` is called before this
// function returns or throws, so that the caller's arrays always hold the current state.
Result descend(Stepper& stepper, Recorder& recorder, const Schedule& schedule,
               const Progress& progress, Monitor& monitor);

}  // namespace dlnfast
