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
  DLNFAST_FIELDS("OptimizerState", velocity, compensation, power_vectors)
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
  if (state.power_vectors.empty()) return;
  require_length(static_cast<Index>(state.power_vectors.size()), n, "power_vectors");
  for (std::size_t l = 0; l < weights.size(); ++l) {
    require_length(state.power_vectors[l].shape[0], weights[l].cols,
                   "power_vectors[" + std::to_string(l) + "]");
  }
}

// Hyperparameters with one value per layer.
struct Rates {
  std::vector<double> learning_rate;
  std::vector<double> weight_decay;
  std::vector<double> momentum;
  AdaptiveRate adaptive;
  DLNFAST_FIELDS("Rates", learning_rate, weight_decay, momentum, adaptive)

  bool any_momentum() const {
    for (const double m : momentum) {
      if (m != 0.0) return true;
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

// Sets the counts to zero. Throws ShapeError where an array is too small for the run.
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
