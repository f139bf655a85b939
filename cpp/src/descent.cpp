#include "dlnfast/descent.hpp"

#include <cmath>
#include <limits>

namespace dlnfast {

Index n_records(const Schedule& schedule) {
  // Below the largest number, so that counts of steps and records cannot overflow.
  if (schedule.steps < 0 || schedule.steps >= std::numeric_limits<Index>::max() / 2) {
    throw std::invalid_argument("steps is negative or beyond any memory");
  }
  if (schedule.record_every < 1) throw std::invalid_argument("record_every is below 1");
  const Index whole = schedule.steps / schedule.record_every + 1;
  return schedule.steps % schedule.record_every == 0 ? whole : whole + 1;
}

Index largest_layer(const Stepper& stepper) {
  Index largest = 0;
  double most = -1.0;
  for (Index l = 0; l < stepper.n_layers(); ++l) {
    const double size = stepper.largest_entry(l);
    if (size > most) {
      most = size;
      largest = l;
    }
  }
  return largest + 1;
}

Result descend(Stepper& stepper, Recorder& recorder, const Schedule& schedule,
               const Progress& progress, Monitor& monitor) {
  n_records(schedule);  // checks the schedule
  const Index breath = stepper.steps_per_breath();
  Index until_record = 0;
  Index until_breath = breath;
  for (Index step = 0;; ++step) {
    const double loss = stepper.evaluate();
    if (!std::isfinite(loss)) return {Outcome::diverged, step, largest_layer(stepper)};
    progress.loss[step] = loss;
    *progress.n_losses = step + 1;

    const bool converged = loss <= schedule.tolerance;
    const bool last = converged || step == schedule.steps;
    const bool at_record = last || until_record == 0;
    if (at_record) {
      const Index record = *progress.n_records;
      recorder.record(record, step);
      progress.record_steps[record] = step;
      *progress.n_records = record + 1;
      until_record = schedule.record_every;
    }
    recorder.after_step(step, loss, last);
    const bool go_on = monitor.at_step(step, loss, at_record);
    if (last) return {converged ? Outcome::converged : Outcome::finished, step, 0};
    if (!go_on) {
      if (!at_record) throw std::logic_error("only a record may stop a run");
      return {Outcome::stopped, step, 0};
    }
    --until_record;
    if (--until_breath == 0) {
      monitor.breathe();
      until_breath = breath;
    }
    stepper.update();
    if (progress.rate != nullptr) progress.rate[step] = stepper.rate();
  }
}

}  // namespace dlnfast
