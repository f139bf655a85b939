// SPDX-License-Identifier: MIT
// Polling for interrupts in long computations.
#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <utility>

#include "dlnfast/errors.hpp"

namespace dlnfast {

// Answer of the caller's callback: continue, stop after this record, or abort.
enum class Answer { go_on, stop, abort };

// Calls the caller's callback at every record, and otherwise at most every `poll_seconds`, so that
// Ctrl-C takes effect. The answer `abort` throws Interrupted from the poll. With a flush callback,
// which needs whole steps, an exception inside a step is rethrown after that step.
class Monitor {
 public:
  using Ask = std::function<Answer(Index step, double loss, bool at_record)>;
  using Flush = std::function<void(Index step)>;
  static constexpr double poll_seconds = 0.05;

  Monitor() = default;
  explicit Monitor(Ask ask, Flush flush = {}) : ask_(std::move(ask)), flush_(std::move(flush)) {}

  // Polls for interrupts inside a step.
  void poll() {
    if (!is_poll_due() || pending_ != nullptr) return;
    if (!flush_) {
      ask_caller(false);
      return;
    }
    try {
      ask_caller(false);
    } catch (...) {
      pending_ = std::current_exception();
    }
  }

  void poll_between_steps() {
    rethrow_pending();
    if (is_poll_due()) ask_caller(false);
  }

  // Reports the loss of a step. Returns false if the caller requests no further step.
  bool at_step(Index step, double loss, bool at_record) {
    step_ = step;
    loss_ = loss;
    rethrow_pending();
    if (!ask_ || !at_record) return true;
    return ask_caller(true) != Answer::stop;
  }

  // Calls the flush callback, which must empty the record buffers up to `step`.
  void flush(Index step) {
    if (flush_) flush_(step);
  }

 private:
  using Clock = std::chrono::steady_clock;

  bool is_poll_due() {
    if (!ask_) return false;
    const auto now = Clock::now();
    if (now - asked_ < std::chrono::duration<double>(poll_seconds)) return false;
    asked_ = now;
    return true;
  }

  // Throws the exception that interrupted the last step.
  void rethrow_pending() {
    if (pending_ != nullptr) std::rethrow_exception(std::exchange(pending_, nullptr));
  }

  Answer ask_caller(bool at_record) {
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

// Resources of a computation: the number of threads, the monitor to poll, and scratch memory.
// Without a workspace, a kernel that needs memory allocates it.
struct Context {
  int n_threads = 0;
  Monitor* monitor = nullptr;
  Workspace* workspace = nullptr;

  void poll() const {
    if (monitor != nullptr) monitor->poll();
  }
};

}  // namespace dlnfast
