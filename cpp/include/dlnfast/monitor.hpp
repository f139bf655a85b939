// The thread of communication between a long computation and its caller.
#pragma once

#include <chrono>
#include <functional>

#include "dlnfast/errors.hpp"

namespace dlnfast {

// What the caller answers when it is asked.
enum class Answer { go_on, stop, abort };

// Asks the caller at most every 50 ms whether to go on (so that Ctrl-C is noticed), and at every
// record. `abort` becomes an Interrupted exception at the place that asked.
class Monitor {
 public:
  using Ask = std::function<Answer(Index step, double loss, bool at_record)>;

  Monitor() = default;
  explicit Monitor(Ask ask) : ask_(std::move(ask)) {}

  // Inside a step, between two pieces of work.
  void breathe() {
    if (!ask_) return;
    const auto now = Clock::now();
    if (now - asked_ < std::chrono::milliseconds(50)) return;
    asked_ = now;
    put(false);
  }

  // After the loss of a step is known. Returns false when the caller wants no further step.
  bool at_step(Index step, double loss, bool at_record) {
    step_ = step;
    loss_ = loss;
    if (!ask_ || !at_record) return true;
    return put(true) != Answer::stop;
  }

 private:
  using Clock = std::chrono::steady_clock;

  Answer put(bool at_record) {
    const Answer answer = ask_(step_, loss_, at_record);
    if (answer == Answer::abort) throw Interrupted();
    return answer;
  }

  Ask ask_;
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
