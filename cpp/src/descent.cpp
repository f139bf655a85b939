// SPDX-License-Identifier: MIT
#include "dlnfast/descent.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace dlnfast {

Index n_records(const Schedule& schedule) {
  // Half of the largest number, so that counts of steps and records cannot overflow.
  if (schedule.steps < 0 || schedule.steps >= std::numeric_limits<Index>::max() / 2) {
    throw std::invalid_argument("steps is negative or too large");
  }
  if (schedule.record_every < 1) throw std::invalid_argument("record_every is below 1");
  if (schedule.first < 0 || schedule.first > schedule.steps) {
    throw std::invalid_argument("the first step is negative or beyond the last one");
  }
  if (schedule.flush_every < 0) throw std::invalid_argument("flush_every is negative");
  const Index multiples = n_multiples(schedule, schedule.record_every);
  if (schedule.flush_every > 0) return multiples + 2;
  const bool extra_first = schedule.first % schedule.record_every != 0;
  const bool extra_last =
      schedule.steps % schedule.record_every != 0 && schedule.steps != schedule.first;
  return multiples + (extra_first ? 1 : 0) + (extra_last ? 1 : 0);
}

Index n_losses(const Schedule& schedule) {
  const Index n_all = schedule.steps - schedule.first + 1;
  return schedule.flush_every > 0 ? std::min(schedule.flush_every, n_all - 1) + 1 : n_all;
}

Index n_multiples(const Schedule& schedule, Index every) {
  if (schedule.flush_every > 0) return std::min(schedule.flush_every, schedule.steps) / every + 2;
  const Index before = schedule.first == 0 ? 0 : (schedule.first - 1) / every + 1;
  return schedule.steps / every + 1 - before;
}

namespace {

void require_table(const MatrixRef<const double>& table, Index steps, Index n_layers,
                   const std::string& name) {
  if (!table.absent()) require_shape(table, steps, table.cols == 1 ? 1 : n_layers, name);
}

}  // namespace

Progress start_progress(const ProgressArrays& arrays, const Schedule& schedule,
                        const Rates& rates) {
  const bool adapts = rates.adaptive.safety > 0.0;
  const Index n_layers = static_cast<Index>(rates.learning_rate.size());
  require_table(rates.tables.learning_rate_table, schedule.steps, n_layers, "learning_rate_table");
  require_table(rates.tables.weight_decay_table, schedule.steps, n_layers, "weight_decay_table");
  require_table(rates.tables.momentum_table, schedule.steps, n_layers, "momentum_table");
  if (adapts && rates.is_scheduled()) {
    throw std::invalid_argument("adaptive rates cannot be combined with tables of rates");
  }
  const Index n = n_losses(schedule);
  require_room(arrays.record_steps, n_records(schedule), {}, "record_steps");
  require_room(arrays.loss, n, {}, "loss");
  // A step follows every loss but the last.
  if (adapts) require_room(arrays.rate, schedule.flush_every > 0 ? n : n - 1, {}, "rate");
  require_room(arrays.counts, n_counts, {}, "counts");
  std::int64_t* counts = arrays.counts.data;
  std::fill(counts, counts + n_counts, 0);
  Progress progress{arrays.loss.data, arrays.record_steps.data, counts + count_losses,
                    counts + count_records};
  if (adapts) progress.rate = arrays.rate.data;
  progress.n_rates = counts + count_rates;
  progress.between_steps = counts + count_between_steps;
  return progress;
}

template <class T>
double largest_magnitude(MatrixRef<const T> m) {
  if (m.rows == 0 || m.cols == 0) return 0.0;
  if (!m.map().allFinite()) return std::numeric_limits<double>::infinity();
  return static_cast<double>(m.map().cwiseAbs().maxCoeff());
}

template double largest_magnitude(MatrixRef<const float> m);
template double largest_magnitude(MatrixRef<const double> m);

void require_layers(Index first, Index length, Index n_layers) {
  if (first >= 0 && length >= 1 && length <= n_layers && first <= n_layers - length) return;
  throw ShapeError("a family begins with layer [" + std::to_string(first) + "] and runs through " +
                   std::to_string(length) + " of them; there are " + std::to_string(n_layers));
}

Index largest_layer(const Stepper& stepper) {
  Index largest = 0;
  double largest_size = -1.0;
  for (Index l = 0; l < stepper.n_layers(); ++l) {
    const double size = stepper.largest_entry(l);
    if (size > largest_size) {
      largest_size = size;
      largest = l;
    }
  }
  return largest + 1;
}

namespace {

Result take_steps(Stepper& stepper, Recorder& recorder, const Schedule& schedule,
                  const Progress& progress, Monitor& monitor) {
  n_records(schedule);  // checks the schedule
  const bool has_flush = schedule.flush_every > 0;
  const Index steps_per_poll = stepper.steps_per_poll();
  const bool is_scheduled = stepper.is_scheduled();
  Index until_record = 0;
  Index until_poll = steps_per_poll;
  for (Index step = schedule.first;; ++step) {
    const double loss = stepper.evaluate();
    if (!std::isfinite(loss)) return {Outcome::diverged, step, largest_layer(stepper)};
    if (progress.between_steps != nullptr) *progress.between_steps = 1;
    progress.loss[*progress.n_losses] = loss;
    *progress.n_losses += 1;

    const bool converged = loss <= schedule.tolerance;
    const bool last = converged || step == schedule.steps;
    const bool at_record = last || until_record == 0;
    if (at_record) {
      const Index record = *progress.n_records;
      recorder.record(record, step);
      progress.record_steps[record] = step;
      *progress.n_records = record + 1;
      until_record = schedule.record_every - step % schedule.record_every;
    }
    recorder.after_step(step, loss, last);
    const bool continues = monitor.at_step(step, loss, at_record);
    if (last) return {converged ? Outcome::converged : Outcome::finished, step, 0};
    if (!continues) {
      if (!at_record) throw std::logic_error("a run can be stopped at a record only");
      return {Outcome::stopped, step, 0};
    }
    --until_record;
    if (has_flush && step % schedule.flush_every == 0 && step != schedule.first) {
      stepper.store();
      monitor.flush(step);
      if (*progress.n_losses != 0 || *progress.n_records != 0) {
        throw std::logic_error("the flush callback did not empty the record buffers");
      }
    }
    if (--until_poll == 0) {
      monitor.poll_between_steps();
      until_poll = steps_per_poll;
    }
    if (progress.between_steps != nullptr) *progress.between_steps = 0;
    if (is_scheduled) stepper.set_step(step);
    stepper.update();
    if (progress.rate != nullptr) {
      progress.rate[*progress.n_rates] = stepper.rate();
      *progress.n_rates += 1;
    }
  }
}

}  // namespace

Result descend(Stepper& stepper, Recorder& recorder, const Schedule& schedule,
               const Progress& progress, Monitor& monitor) {
  if (schedule.flush_every == 0) return take_steps(stepper, recorder, schedule, progress, monitor);
  try {
    const Result result = take_steps(stepper, recorder, schedule, progress, monitor);
    stepper.store();
    return result;
  } catch (...) {
    stepper.store();
    throw;
  }
}

}  // namespace dlnfast
