// SPDX-License-Identifier: MIT
#include "dlnfast/monitor.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <vector>

#include "check.hpp"
#include "dlnfast/build_info.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/thin_product.hpp"

using namespace dlnfast;
using check::random_matrix;

namespace {

void pause(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// A stepper whose loss is 1, 1/2, 1/4, ..
class Halving final : public Stepper {
 public:
  double evaluate() override { return loss_; }
  void update() override {
    loss_ *= 0.5;
    if (pause_ > 0) pause(pause_);
    if (++n_updates_ == diverges_at) loss_ = std::nan("");
  }
  Index n_layers() const override { return 9; }
  double largest_entry(Index layer) const override { return layer == 6 ? 2.0 : 1.0; }
  Index steps_per_poll() const override { return poll_interval; }

  int pause_ = 0;
  Index poll_interval = 1;
  Index diverges_at = -1;

 private:
  double loss_ = 1.0;
  Index n_updates_ = 0;
};

class StepRecorder final : public Recorder {
 public:
  void record(Index record, Index step) override {
    CHECK(record == static_cast<Index>(steps.size()));
    steps.push_back(step);
  }
  void after_step(Index step, double /*loss*/, bool last) override {
    ++n_steps;
    if (last) last_step = step;
  }
  std::vector<Index> steps;
  Index n_steps = 0, last_step = -1;
};

// A recorder that stores nothing. For runs with a flush, whose record numbers restart from 0.
class NullRecorder final : public Recorder {
 public:
  void record(Index /*record*/, Index /*step*/) override {}
  void after_step(Index /*step*/, double /*loss*/, bool /*last*/) override {}
};

// Steps of 60 ms that poll in the middle.
class PollingStepper final : public Stepper {
 public:
  explicit PollingStepper(Monitor& monitor) : monitor_(&monitor) {}
  double evaluate() override { return 1.0; }
  void update() override {
    ++n_started;
    pause(60);
    monitor_->poll();
    ++n_finished;
  }
  Index n_layers() const override { return 1; }
  double largest_entry(Index /*layer*/) const override { return 1.0; }
  // No polls between two steps.
  Index steps_per_poll() const override { return Index(1) << 40; }

  Index n_started = 0, n_finished = 0;

 private:
  Monitor* monitor_;
};

struct Run {
  std::vector<double> loss;
  std::vector<std::int64_t> record_steps;
  std::int64_t n_losses = 0, n_records = 0;
  StepRecorder recorder;
  Result result{};

  Run(Stepper& stepper, const Schedule& schedule, Monitor monitor) {
    loss.assign(static_cast<std::size_t>(schedule.steps) + 1, -1.0);
    record_steps.assign(static_cast<std::size_t>(dlnfast::n_records(schedule)), -1);
    const Progress progress{loss.data(), record_steps.data(), &n_losses, &n_records};
    result = descend(stepper, recorder, schedule, progress, monitor);
  }
};

Schedule schedule(Index steps, Index every, double tolerance = -1.0) {
  Schedule s;
  s.steps = steps;
  s.record_every = every;
  s.tolerance = tolerance;
  return s;
}

void records_fall_on_the_schedule() {
  for (const auto& [steps, every, wanted] :
       std::vector<std::tuple<Index, Index, std::vector<Index>>>{{0, 1, {0}},
                                                                 {0, 5, {0}},
                                                                 {3, 1, {0, 1, 2, 3}},
                                                                 {4, 2, {0, 2, 4}},
                                                                 {5, 2, {0, 2, 4, 5}},
                                                                 {5, 9, {0, 5}}}) {
    Halving stepper;
    const Run run(stepper, schedule(steps, every), Monitor());
    CHECK(run.result.outcome == Outcome::finished && run.result.step == steps);
    CHECK(run.recorder.steps == wanted);
    CHECK(run.n_records == static_cast<Index>(wanted.size()));
    CHECK(run.n_records == n_records(schedule(steps, every)));
    CHECK(std::equal(wanted.begin(), wanted.end(), run.record_steps.begin()));
    CHECK(run.n_losses == steps + 1 && run.recorder.n_steps == steps + 1);
    CHECK(run.recorder.last_step == steps);
    for (Index t = 0; t <= steps; ++t) CHECK(run.loss[t] == std::ldexp(1.0, -int(t)));
  }
  CHECK(n_records(schedule(Index(1) << 40, 3)) == (Index(1) << 40) / 3 + 2);
}

void runs_end_as_requested() {
  {
    Halving stepper;  // at or below the tolerance, between two records
    const Run run(stepper, schedule(100, 4, 0.125), Monitor());
    CHECK(run.result.outcome == Outcome::converged && run.result.step == 3);
    CHECK((run.recorder.steps == std::vector<Index>{0, 3}) && run.n_losses == 4);
  }
  {
    Halving stepper;
    stepper.diverges_at = 5;
    const Run run(stepper, schedule(100, 2), Monitor());
    CHECK(run.result.outcome == Outcome::diverged && run.result.step == 5 && run.result.layer == 7);
    CHECK((run.recorder.steps == std::vector<Index>{0, 2, 4}) && run.n_losses == 5);
  }
  {
    Halving stepper;  // the answer `stop` counts at records only
    std::vector<Index> asked;
    const Run run(stepper, schedule(100, 3), Monitor([&](Index step, double loss, bool at_record) {
                    if (at_record) asked.push_back(step);
                    CHECK(loss == std::ldexp(1.0, -int(step)));
                    return step >= 5 ? Answer::stop : Answer::go_on;
                  }));
    CHECK(run.result.outcome == Outcome::stopped && run.result.step == 6);
    CHECK((asked == std::vector<Index>{0, 3, 6}) && run.recorder.steps == asked);
    CHECK(run.n_losses == 7 && run.recorder.last_step == -1);
  }
  {
    Halving stepper;  // `stop` at the last record has no effect
    const Run run(stepper, schedule(3, 3), Monitor([](Index step, double, bool) {
                    return step == 3 ? Answer::stop : Answer::go_on;
                  }));
    CHECK(run.result.outcome == Outcome::finished && run.result.step == 3);
  }
  Halving stepper;
  const auto bad = [&](Index steps, Index every) {
    Schedule s = schedule(steps, every);
    std::int64_t n = 0;
    double loss = 0.0;
    StepRecorder recorder;
    Monitor monitor;
    descend(stepper, recorder, s, Progress{&loss, &n, &n, &n}, monitor);
  };
  CHECK_THROWS(bad(-1, 1), std::invalid_argument);
  CHECK_THROWS(bad(1, 0), std::invalid_argument);
  CHECK_THROWS(n_records(schedule(1, 0)), std::invalid_argument);
}

void interrupts_leave_readable_losses() {
  // Between records, by time; the losses so far remain readable.
  for (const Index poll_interval : {1, 4}) {
    Halving stepper;
    stepper.pause_ = 10;
    stepper.poll_interval = poll_interval;
    StepRecorder recorder;
    std::vector<double> loss(1001);
    std::vector<std::int64_t> steps(2);
    std::int64_t n_losses = 0, n_done = 0;
    int asked = 0;
    Monitor monitor([&](Index, double, bool at_record) {
      if (at_record) return Answer::go_on;
      return ++asked == 3 ? Answer::abort : Answer::stop;  // `stop` counts at records only
    });
    const Progress progress{loss.data(), steps.data(), &n_losses, &n_done};
    CHECK_THROWS(descend(stepper, recorder, schedule(1000, 1000), progress, monitor), Interrupted);
    CHECK(asked == 3 && n_done == 1);
    CHECK(n_losses >= 3 && n_losses < 200);
    CHECK(loss[n_losses - 1] == std::ldexp(1.0, 1 - int(n_losses)));
  }
  // At a record, and with an exception thrown by the caller.
  Halving stepper;
  CHECK_THROWS(Run(stepper, schedule(9, 1), Monitor([](Index step, double, bool) {
                     return step == 2 ? Answer::abort : Answer::go_on;
                   })),
               Interrupted);
  CHECK_THROWS(Run(stepper, schedule(9, 1),
                   Monitor([](Index, double, bool) -> Answer { throw std::out_of_range("mine"); })),
               std::out_of_range);
}

// Flushes move the records out of the buffers, from any first step.
void flushes_fall_on_the_schedule() {
  for (const Index first : {0, 5, 6, 11}) {
    for (const Index every : {1, 4, 11, 50}) {
      Halving stepper;
      Schedule s = schedule(11, 3);
      s.first = first;
      s.flush_every = every;
      std::vector<double> loss(static_cast<std::size_t>(n_losses(s)), -1.0), losses;
      std::vector<std::int64_t> steps(static_cast<std::size_t>(n_records(s)), -1), all_steps;
      std::int64_t n_losses_stored = 0, n_recorded = 0, between = 0;
      const Progress progress{loss.data(), steps.data(), &n_losses_stored, &n_recorded,
                              nullptr,     nullptr,      &between};
      std::vector<Index> flushed;
      const auto flush = [&](Index step) {
        flushed.push_back(step);
        losses.insert(losses.end(), loss.begin(), loss.begin() + n_losses_stored);
        all_steps.insert(all_steps.end(), steps.begin(), steps.begin() + n_recorded);
        n_losses_stored = n_recorded = 0;
      };
      Monitor monitor({}, flush);
      NullRecorder recorder;
      const Result result = descend(stepper, recorder, s, progress, monitor);
      CHECK(result.outcome == Outcome::finished && result.step == 11 && between == 1);
      flush(11);
      std::vector<Index> wanted_flushes;
      for (Index t = first + 1; t < 11; ++t) {
        if (t % every == 0) wanted_flushes.push_back(t);
      }
      wanted_flushes.push_back(11);
      CHECK(flushed == wanted_flushes);
      CHECK(static_cast<Index>(losses.size()) == 11 - first + 1);
      for (std::size_t t = 0; t < losses.size(); ++t) {
        CHECK(losses[t] == std::ldexp(1.0, -int(t)));
      }
      std::vector<std::int64_t> wanted_steps{first};
      for (Index t = first + 1; t <= 11; ++t) {
        if (t % 3 == 0 || t == 11) wanted_steps.push_back(t);
      }
      CHECK(all_steps == wanted_steps);
    }
  }
  Schedule s = schedule(9, 1);
  s.first = 10;
  CHECK_THROWS(n_records(s), std::invalid_argument);
  s.first = 0;
  s.flush_every = -1;
  CHECK_THROWS(n_records(s), std::invalid_argument);
  // A flush that does not empty the buffers is detected before anything is written beyond them.
  s.flush_every = 2;
  Halving stepper;
  NullRecorder recorder;
  std::vector<double> loss(static_cast<std::size_t>(n_losses(s)));
  std::vector<std::int64_t> steps(static_cast<std::size_t>(n_records(s)));
  std::int64_t n_losses_stored = 0, n_recorded = 0;
  Monitor not_flushing({}, [](Index) {});
  CHECK_THROWS(
      descend(stepper, recorder, s,
              Progress{loss.data(), steps.data(), &n_losses_stored, &n_recorded}, not_flushing),
      std::logic_error);
}

// With a flush callback, an exception inside a step is thrown after that step.
void interrupts_wait_for_whole_steps() {
  for (const bool flushes : {false, true}) {
    Monitor monitor;
    PollingStepper stepper(monitor);
    Schedule s = schedule(1000, 1000);
    s.flush_every = flushes ? 1000 : 0;
    std::vector<double> loss(1001);
    std::vector<std::int64_t> steps(3);
    std::int64_t n_losses_stored = 0, n_recorded = 0, between = 0;
    const Progress progress{loss.data(), steps.data(), &n_losses_stored, &n_recorded,
                            nullptr,     nullptr,      &between};
    const auto ask = [](Index, double, bool at_record) -> Answer {
      if (at_record) return Answer::go_on;
      throw std::out_of_range("mine");
    };
    monitor = Monitor(ask, flushes ? Monitor::Flush([](Index) {}) : Monitor::Flush());
    NullRecorder recorder;
    CHECK_THROWS(descend(stepper, recorder, s, progress, monitor), std::out_of_range);
    CHECK(between == (flushes ? 1 : 0));
    CHECK(stepper.n_finished == stepper.n_started - (flushes ? 0 : 1));
    CHECK(n_losses_stored == stepper.n_finished + 1);
  }
}

void polls_respect_the_interval() {
  int asked = 0;
  Monitor monitor([&](Index, double, bool) {
    ++asked;
    return Answer::go_on;
  });
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 1000; ++i) monitor.poll();
  pause(60);
  monitor.poll();
  const auto elapsed = std::chrono::steady_clock::now() - start;
  CHECK(asked >= 1 && asked <= 1 + elapsed / std::chrono::milliseconds(50));
  Monitor empty;
  empty.poll();
  CHECK(empty.at_step(0, 1.0, true));
  Context().poll();
}

// A product of more than a second can be interrupted before all terms are added.
void long_product_polls() {
  const Index n = 3600;
  Matrix<float> a = Matrix<float>::Constant(n, n, 1.0F), b = a;
  Matrix<float> c = Matrix<float>::Constant(n, n, -1.0F);
  int asked = 0;
  Monitor monitor(
      [&](Index, double, bool) { return ++asked == 2 ? Answer::abort : Answer::go_on; });
  pause(60);
  CHECK_THROWS(multiply<float>(a, Op::none, b, Op::none, c, Context{1, &monitor}), Interrupted);
  CHECK(asked == 2);
  CHECK(c(n - 1, n - 1) < static_cast<float>(n));  // the value of the whole product
}

template <class Body>
void check_interrupts(const Body& body) {
  Monitor monitor([](Index, double, bool) { return Answer::abort; });
  pause(60);
  CHECK_THROWS(body(Context{2, &monitor}), Interrupted);
}

void every_long_call_polls() {
  Matrix<double> w = random_matrix<double>(50, 60), x = random_matrix<double>(4, 60);
  Matrix<double> y(4, 50), z = random_matrix<double>(4, 50), square(50, 50);
  const Matrix<double> before = w;
  GradientStep<double> d;
  d.learning_rate = 1.0;
  check_interrupts(
      [&](const Context& c) { multiply<double>(w, Op::none, w, Op::transpose, square, c); });
  check_interrupts([&](const Context& c) { thin_times_transpose<double>(x, w, y, c); });
  check_interrupts([&](const Context& c) { thin_times<double>(z, w, x, c); });
  check_interrupts([&](const Context& c) { thin_descend<double>(z, x, w, d, c); });
  CHECK(w == before);

  Matrix<double> w1 = random_matrix<double>(40, 40), w2 = w1, target = w1;
  Objective<double> objective;
  objective.target = target;
  const Rates rates{{0.1, 0.1}, {0, 0}, {0, 0}, {}};
  check_interrupts([&](const Context& c) {
    DenseDescent<double> descent({w1, w2}, objective, rates, c);
    for (int t = 0; t < 10; ++t) {
      descent.evaluate();
      descent.update();
    }
  });
}

void build_info_is_complete() {
  const BuildInfo info = build_info();
  CHECK(!info.version.empty() && !info.level.empty() && !info.compiler.empty());
  CHECK(info.eigen.size() >= 5);
  CHECK(info.vector_bytes == 16 || info.vector_bytes == 32 || info.vector_bytes == 64);
}

}  // namespace

int main() {
  records_fall_on_the_schedule();
  runs_end_as_requested();
  interrupts_leave_readable_losses();
  flushes_fall_on_the_schedule();
  interrupts_wait_for_whole_steps();
  polls_respect_the_interval();
  long_product_polls();
  every_long_call_polls();
  build_info_is_complete();
  return check::result();
}
