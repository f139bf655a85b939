// SPDX-License-Identifier: MIT
// The thread of communication between a long computation and its caller.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <utility>

#include "dlnfast/errors.hpp"

namespace dlnfast {

// What the caller answers when it is asked.
enum class Answer { go_on, stop, abort };

// Asks the caller at most every 50 ms whether to go on (so that Ctrl-C is noticed), and at every
// record. `abort` becomes an Interrupted exception at the place that asked; with a drain, which wants
// whole steps, at the next place between two steps.
class Monitor {
 public:
  using Ask = std::function<Answer(Index step, double loss, bool at_record)>;
  using Drain = std::function<void(Index step)>;

  Monitor() = default;
  explicit Monitor(Ask ask, Drain drain = {}) : ask_(std::move(ask)), drain_(std::move(drain)) {}

  // Inside a step, between two pieces of work.
  void breathe() {
    if (!is_time() || pending_ != nullptr) return;
    if (!drain_) {
      put(false);
      return;
    }
    try {
      put(false);
    } catch (...) {
      pending_ = std::current_exception();
    }
  }

  void breathe_between_steps() {
    hand_on();
    if (is_time()) put(false);
  }

  // After the loss of a step is known. Returns false when the caller wants no further step.
  bool at_step(Index step, double loss, bool at_record) {
    step_ = step;
    loss_ = loss;
    hand_on();
    if (!ask_ || !at_record) return true;
    return put(true) != Answer::stop;
  }

  // Lets the caller take away what was recorded up to `step`.
  void drain(Index step) {
    if (drain_) drain_(step);
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool is_time() {
    if (!ask_) return false;
    const auto now = Clock::now();
    if (now - asked_ < std::chrono::milliseconds(50)) return false;
    asked_ = now;
    return true;
  }

  // What was thrown inside a step.
  void hand_on() {
    if (pending_ != nullptr) std::rethrow_exception(std::exchange(pending_, nullptr));
  }

  Answer put(bool at_record) {
    const Answer answer = ask_(step_, loss_, at_record);
    if (answer == Answer::abort) throw Interrupted();
    return answer;
  }

  Ask ask_;
  Drain drain_;
  std::exception_ptr pending_;
  Clock::time_point asked_ = Clock::now();
  Index step_ = 0;
  double loss_ = 0.0;
};

class Workspace;

// Where a computation runs: its team, whom it tells that it is alive, and the memory that it may
// write over; without one, a kernel that needs some allocates it.
struct Context {
  int n_threads = 0;
  Monitor* monitor = nullptr;
  Workspace* workspace = nullptr;

  void breathe() const {
    if (monitor != nullptr) monitor->breathe();
  }
};

}  // namespace dlnfast
