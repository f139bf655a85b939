// SPDX-License-Identifier: MIT
// Who runs how much: team sizes, and parallel regions that exceptions can leave.
//
// Policy: a request of 0 asks OpenMP for its own maximum (so OMP_NUM_THREADS and threadpoolctl are
// obeyed) and gives small work to one thread; -n asks for the same with at most n threads; a positive
// request is taken literally. OpenMP's process-wide settings are never changed. A forked child runs
// on one thread, because libgomp's threads do not survive the fork.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>

#include "dlnfast/types.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace dlnfast {

bool has_openmp();

// Default team size where a call asks for 0 threads; 0 restores OpenMP's own maximum, or the number of
// processors where that maximum is below 1 or above 4096. max_threads() is between 1 and 4096.
void set_num_threads(int n);
int max_threads();

// From here on one thread only: for a forked child.
void forbid_threads();

// Threads for `work` flops when every thread should get at least `work_per_thread` of them.
int team_size(int requested, double work, double work_per_thread);

// Chooses the team for a computation in many like steps, by their times. Where another program holds
// a core, a team waits for its last member at the end of every region, often longer than one thread
// alone would take. So the team is halved where steps with half of it turn out to be faster, and
// doubled where that is; a larger team that fails its trial, or does well in it and then falls behind,
// is tried again after ever longer times; a smaller one while some steps take much longer than others.
// Steps are judged together, for some milliseconds: of short ones only a few fall into the other
// program's turns, and these are the slow ones.
// On a machine without other work this costs one step, or four milliseconds, with half of the team.
class TeamChoice {
 public:
  explicit TeamChoice(int largest) : largest_(largest), size_(largest) {}

  // For the next step.
  int size() const { return trial_size_ > 0 ? trial_size_ : size_; }
  // How long it took, in seconds.
  void took(double seconds);

 private:
  // Steps that are judged together: so many at least, for so many seconds at least.
  struct Stretch {
    int steps = 0;
    double seconds = 0.0;
    double least = 0.0;  // the shortest step
    void add(double step) {
      least = steps == 0 ? step : std::min(least, step);
      ++steps;
      seconds += step;
    }
    double mean() const { return seconds / steps; }
    bool covers(int n, double time) const { return steps >= n && seconds >= time; }
  };

  void judge();

  int largest_;
  int size_;
  bool first_ = true;
  double elapsed_ = 0.0;
  Stretch recent_;                   // of the chosen team
  double usual_ = 0.0, best_ = 0.0;  // the last mean of a stretch, and the least so far
  int trial_size_ = 0;               // 0: no trial
  int trial_steps_ = 0;
  Stretch trial_;
  bool smaller_tried_ = false;
  double next_smaller_ = 0.0, next_larger_ = 0.0;  // not before so much has elapsed
  double patience_ = 0.0;
};

// The part [begin, end) of n items that belongs to one member of a team, in whole grains.
struct Share {
  Index begin;
  Index end;
};
inline Share share(Index n, Index grain, Index member, Index team) {
  const Index grains = (n + grain - 1) / grain;
  const Index begin = grains * member / team * grain;
  const Index end = grains * (member + 1) / team * grain;
  return {std::min(begin, n), std::min(end, n)};
}

// Runs body(member, team) on n_threads threads; the first exception is rethrown to the caller.
template <class Body>
void parallel([[maybe_unused]] int n_threads, const Body& body) {
#ifdef _OPENMP
  if (n_threads > 1) {
    std::exception_ptr failure;
#pragma omp parallel num_threads(n_threads)
    {
      try {
        body(omp_get_thread_num(), omp_get_num_threads());
      } catch (...) {
#pragma omp critical(dlnfast_failure)
        if (!failure) failure = std::current_exception();
      }
    }
    if (failure) std::rethrow_exception(failure);
    return;
  }
#endif
  body(0, 1);
}

// Runs body(0), .. body(n - 1) on n_threads threads, each call on whoever is free: a thread that
// lost its core to another program holds up one call, not a share of all.
template <class Body>
void parallel_deal(int n_threads, Index n, const Body& body) {
  std::atomic<Index> next{0};
  parallel(n_threads, [&](int, int) {
    for (Index i = next++; i < n; i = next++) body(i);
  });
}

}  // namespace dlnfast
