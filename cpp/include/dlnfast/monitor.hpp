// SPDX-License-Identifier: MIT
// How a long computation polls its caller.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <utility>

#include "dlnfast/errors.hpp"

namespace dlnfast {

// What the caller answers when it is asked.
enum class Answer { go_on, stop, abort };

// Asks the caller at most every `poll_seconds` whether to go on (so that Ctrl-C is noticed), and at every
// record. `abort` becomes an Interrupted exception at the place that asked; with a flush, which needs
// whole steps, at the next place between two steps.
class Monitor {
 public:
  using Ask = std::function<Answer(Index step, double loss, bool at_record)>;
  using Flush = std::function<void(Index step)>;
  static constexpr double poll_seconds = 0.05;

  Monitor() = default;
  explicit Monitor(Ask ask, Flush flush = {}) : ask_(std::move(ask)), flush_(std::move(flush)) {}

  // Inside a step, between two pieces of work.
  void breathe() {
    if (!is_time() || pending_ != nullptr) return;
    if (!flush_) {
      put(false);
      return;
    }
    try {
      put(false);
    } catch (...) {
      pending_ = std::current_exception();
    }
  }

  void poll_between_steps() {
    rethrow_pending();
    if (is_time()) put(false);
  }

  // After the loss of a step is known. Returns false when the caller wants no further step.
  bool at_step(Index step, double loss, bool at_record) {
    step_ = step;
    loss_ = loss;
    rethrow_pending();
    if (!ask_ || !at_record) return true;
    return put(true) != Answer::stop;
  }

  // Lets the caller take away the records up to `step`.
  void flush(Index step) {
    if (flush_) flush_(step);
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool is_time() {
    if (!ask_) return false;
    const auto now = Clock::now();
    if (now - asked_ < std::chrono::duration<double>(poll_seconds)) return false;
    asked_ = now;
    return true;
  }

  // Throws the exception of the last step.
  void rethrow_pending() {
    if (pending_ != nullptr) std::rethrow_exception(std::exchange(pending_, nullptr));
  }

  Answer put(bool at_record) {
    const Answer answer = ask_(step_, loss_, at_record);
    if (answer == Answer::abort) throw Interrupted();
    return answer;
  }

  Ask ask_;
  Flush flush_;
  std::exception_ptr pending_;
  Clock::time_point asked_ = Clock::now();
  Index step_ = 0;
  double loss_ = 0.0;
};

class Workspace;

// Where a computation runs: its team, the monitor that it polls, and the memory that it may write over;
// without one, a kernel that needs memory allocates it.
struct Context {
  int n_threads = 0;
  Monitor* monitor = nullptr;
  Workspace* workspace = nullptr;

  void breathe() const {
    if (monitor != nullptr) monitor->breathe();
  }
};

}  // namespace dlnfast
