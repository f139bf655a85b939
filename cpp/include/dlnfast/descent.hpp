// SPDX-License-Identifier: MIT
// Gradient descent as a loop over steps, whatever computes a step.
//
// The model is W_{L:1} = W_L ... W_1 with loss c/2 ||W F - G||_F^2 + floor, where S = F F^T, Phi = G F^T:
// that of as many samples as S has rank. F = 1 and G = Phi where S = 1. It is a sum of squares, so that
// nothing cancels, and what W does outside the range of S does not enter it.
// All layers move at once:
//   V_l <- momentum_l V_l + G_l + weight_decay_l W_l,   W_l <- W_l - learning_rate_l V_l,
//   G_l  = c W_{L:l+1}^T (W_{L:1} S - Phi) W_{l-1:1}^T .
// Where only some entries of Phi, or linear measurements y = B vec(M*), are known, the loss is
// c/2 ||Omega * (W - Phi)||^2 or c/2 ||B vec(W) - y||^2, and the gradient of that with respect to W
// takes the place of W_{L:1} S - Phi. (That product, not (W F - G) F^T: F knows the directions of small
// eigenvalues of S less well than Phi does.)
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
#include "dlnfast/fields.hpp"
#include "dlnfast/monitor.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// What is learned: sufficient statistics of the data, or observations of the matrix itself.
template <class T>
struct Objective {
  MatrixRef<const T> target;      // Phi, d_L x d_0; no data where one of the last two is given
  MatrixRef<const T> input_gram;  // S, d_0 x d_0; no data: the identity
  // F, d_0 x r with r <= d_0, and G, d_L x r; needed only beside input_gram.
  MatrixRef<const T> input_factor, factor_target;
  double loss_scale = 1.0;  // c
  double loss_floor = 0.0;  // the part of the loss that no W removes
  std::optional<ObservedEntries<T>> observed;
  std::optional<Measurements<T>> measurements;
  DLNFAST_FIELDS("Objective", target, input_gram, input_factor, factor_target, loss_scale,
                 loss_floor, observed, measurements)

  bool has_target() const { return !observed && !measurements; }
};

// Throws ShapeError where the statistics do not go with a chain from d_in to d_out.
template <class T>
void check_statistics(const Objective<T>& objective, Index d_out, Index d_in) {
  require_shape(objective.target, d_out, d_in, "target");
  if (objective.input_gram.absent()) return;
  const Index rank = std::min(objective.input_factor.cols, d_in);
  require_shape(objective.input_gram, d_in, d_in, "input_gram");
  require_shape(objective.input_factor, d_in, rank, "input_factor");
  require_shape(objective.factor_target, d_out, rank, "factor_target");
}

// Rates that follow the weights: at every step learning_rate_l times
//   eta = (1 - mu) safety / (c sum_l m_l q_l s_l^2 + c max_l sum_{k != l} sqrt(m_l m_k) s_lk e + lambda),
// with mu the largest momentum, lambda the largest m_l weight_decay_l, m_l = learning_rate_l, s_l (s_lk)
// the product of the largest singular values of all layers but l (and k), and e a bound on the norm of
// the gradient of the loss with respect to W_{L:1}, over c. The first sum bounds the Gauss-Newton part of
// the Hessian, in the metric of the rates, the second what the residual adds; descent is stable below 2.
// Largest singular values come from power iteration that goes on from step to step.
struct AdaptiveRate {
  double safety = 0.0;            // 0: rates are constant
  std::vector<double> curvature;  // q_l: 1 where the whole of Phi is known
  double error_scale = 1.0;       // e / sqrt(2 (loss - floor) / c)
  DLNFAST_FIELDS("AdaptiveRate", safety, curvature, error_scale)
};

// The part of the state beside the weights that a resumed run needs: arrays of the caller, read at the
// start, written by Stepper::store. Empty lists: start from zeros, store nothing.
template <class T>
struct OptimizerState {
  std::vector<MatrixRef<T>> velocity;      // as the weights
  std::vector<MatrixRef<T>> compensation;  // of compensated sums (small_descent.cpp)
  std::vector<ArrayRef<T, 1>>
      power_vectors;  // d_{l-1}: power iteration of AdaptiveRate; zeros: any start
  DLNFAST_FIELDS("OptimizerState", velocity, compensation, power_vectors)
};

// Throws ShapeError where arrays do not go with the weights.
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

// One value per layer.
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
  double tolerance = -1.0;  // stop once the loss is at most this
  Index first = 0;          // the step that the weights are at; recorded like step 0
  // Steps between two calls of Monitor::flush, whose caller takes the records away; 0: never.
  Index flush_every = 0;
  DLNFAST_FIELDS("Schedule", steps, record_every, tolerance, first, flush_every)
};

enum class Outcome { finished, converged, stopped, diverged };
inline constexpr const char* outcome_names[] = {"finished", "converged", "stopped", "diverged"};
constexpr auto& names_of(Outcome) { return outcome_names; }

struct Result {
  Outcome outcome;
  Index step;   // last step whose loss is known; where it diverged, the first whose loss is not
  Index layer;  // counted from 1; only where it diverged
};

// Positions in the caller's array of counts; the last is 1 unless an exception came out of a step.
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

// Progress that the caller may read while the loop runs, or after an exception. Counts start at zero;
// whoever flushes the records sets them back to that.
struct Progress {
  double* loss = nullptr;                // n_losses(schedule) values
  std::int64_t* record_steps = nullptr;  // n_records(schedule) values
  std::int64_t* n_losses = nullptr;
  std::int64_t* n_records = nullptr;
  double* rate = nullptr;  // as many values of Stepper::rate, or nobody wants them
  std::int64_t* n_rates = nullptr;
  std::int64_t* between_steps = nullptr;  // 1 unless an exception came out of the middle of a step
};

// Arrays of the caller for a run's progress.
struct ProgressArrays {
  ArrayRef<double, 1> loss;
  ArrayRef<double, 1> rate;  // only where rates are adaptive
  ArrayRef<std::int64_t, 1> record_steps, counts;
  DLNFAST_FIELDS("ProgressArrays", loss, rate, record_steps, counts)
};

// Room for the records of a whole run, or of those between two flushes: `first`, multiples of
// record_every, and the last step.
Index n_records(const Schedule& schedule);
Index n_losses(const Schedule& schedule);
// The same for records at multiples of `every` only.
Index n_multiples(const Schedule& schedule, Index every);

// Sets the counts to zero. Throws ShapeError where an array is too small for the run.
Progress start_progress(const ProgressArrays& arrays, const Schedule& schedule, const Rates& rates);

// Networks up to this width live in registers and the first-level cache; their sums are compensated.
inline constexpr Index small_limit = 32;

// One run's state: weights at the current step.
class Stepper {
 public:
  virtual ~Stepper() = default;
  // The loss at the current weights; prepares `update`.
  virtual double evaluate() = 0;
  // One step from the weights of the last `evaluate`.
  virtual void update() = 0;
  virtual Index n_layers() const = 0;
  // Of layer `layer` (from 0), as largest_magnitude.
  virtual double largest_entry(Index layer) const = 0;
  // What the layers' learning rates are multiplied by in the step that `evaluate` prepared.
  virtual double rate() const { return 1.0; }
  // Writes weights and optimizer state to the caller's arrays.
  virtual void store() {}
  // How many steps may pass between two polls for interrupts.
  virtual Index steps_per_poll() const { return 1; }
};

// That a family of directions (reduced_descent.hpp) runs through layers that there are.
void require_layers(Index first, Index length, Index n_layers);

// The layer, counted from 1, that holds the largest entry.
Index largest_layer(const Stepper& stepper);

// The largest absolute entry of a matrix, infinity if one is not finite.
template <class T>
double largest_magnitude(MatrixRef<const T> m);

// Stores the records of a run.
class Recorder {
 public:
  virtual ~Recorder() = default;
  virtual void record(Index record, Index step) = 0;
  // Called once per step, after `record` if that step is recorded. The weights are updated next, unless
  // this step is the last.
  virtual void after_step(Index /*step*/, double /*loss*/, bool /*last*/) {}
};

// Takes the steps of the schedule. Where records are flushed, the caller's arrays hold the state whatever
// ends the run.
Result descend(Stepper& stepper, Recorder& recorder, const Schedule& schedule,
               const Progress& progress, Monitor& monitor);

}  // namespace dlnfast
