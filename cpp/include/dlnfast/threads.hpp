// SPDX-License-Identifier: MIT
// Thread teams: their sizes, and parallel regions that propagate exceptions.
//
// A request of 0 threads uses OpenMP's maximum (and hence OMP_NUM_THREADS and threadpoolctl), but
// one thread for small work. A request of -n does the same with at most n threads, and a positive
// request is used as it is. OpenMP's process-wide settings are never changed. A forked child runs
// on one thread, because libgomp's threads do not exist in it.
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

// Sets the default team size for requests of 0 threads. 0 restores OpenMP's maximum, or the number
// of processors if that maximum is below 1 or above 4096. max_threads() is between 1 and 4096.
void set_num_threads(int n);
int max_threads();

// Restricts the process to one thread, permanently: for a forked child.
void forbid_threads();

// Returns the number of threads for `work` flops, so that each thread gets at least
// `work_per_thread` of them.
int team_size(int requested, double work, double work_per_thread);

// Chooses the team size of an iterative computation from measured step times. If another program
// occupies a core, every parallel region waits for the slowest thread, often longer than one thread
// alone would take. So the team is halved where half of it is faster, and doubled where twice of it
// is. A larger team that fails its trial, or becomes slow soon after it, is tried again after
// increasing waiting times. A smaller team is tried again while some steps take much longer than
// others. Times are averaged over some milliseconds: another program's time slices slow down only a
// few of many short steps. On an otherwise idle machine this costs one step, or four milliseconds,
// with half of the team.
class TeamChoice {
 public:
  explicit TeamChoice(int largest) : largest_(largest), size_(largest) {}

  // Team size of the next step.
  int size() const { return trial_size_ > 0 ? trial_size_ : size_; }
  // Records the duration of that step, in seconds.
  void record_time(double seconds);

 private:
  // Steps whose times are averaged.
  struct Window {
    int steps = 0;
    double seconds = 0.0;
    double shortest = 0.0;  // time of the shortest step
    void add(double step) {
      shortest = steps == 0 ? step : std::min(shortest, step);
      ++steps;
      seconds += step;
    }
    double mean() const { return seconds / steps; }
    bool covers(int n, double time) const { return steps >= n && seconds >= time; }
  };

  void finish_trial();

  int largest_;
  int size_;
  bool first_ = true;
  double elapsed_ = 0.0;
  Window recent_;             // with the chosen team
  double recent_mean_ = 0.0;  // mean step time of the last window
  double best_mean_ = 0.0;    // smallest mean so far
  int trial_size_ = 0;        // 0: no trial
  int trial_steps_ = 0;
  Window trial_;
  bool smaller_tried_ = false;
  double next_smaller_ = 0.0, next_larger_ = 0.0;  // earliest times of the next trials
  double retry_wait_ = 0.0;
};

// The part [begin, end) of n items that one thread of a team processes, in multiples of `grain`.
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

// Calls body(0), .. body(n - 1) on n_threads threads with a dynamic schedule. Each thread takes the
// indices of its own contiguous share, and then those left in the shares of others: a thread that
// loses its core to another program delays one call, not a fixed share of all. Equal calls one
// after the other find their data in the caches of the same core.
template <class Body>
void parallel_dynamic(int n_threads, Index n, const Body& body) {
  constexpr int most_queues = 64;  // further threads share them
  struct alignas(64) Queue {
    std::atomic<Index> next;
    Index end;
  };
  Queue queues[most_queues];
  const int n_queues = std::clamp(n_threads, 1, most_queues);
  for (int q = 0; q < n_queues; ++q) {
    const Share own = share(n, 1, q, n_queues);
    queues[q].next = own.begin;
    queues[q].end = own.end;
  }
  parallel(n_threads, [&](int member, int) {
    for (int turn = 0; turn < n_queues; ++turn) {
      Queue& queue = queues[(member + turn) % n_queues];
      for (Index i = queue.next++; i < queue.end; i = queue.next++) body(i);
    }
  });
}

}  // namespace dlnfast
