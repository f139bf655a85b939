// Who runs how much: team sizes, and parallel regions that exceptions can leave.
//
// Policy: a request of 0 asks OpenMP for its own maximum (so OMP_NUM_THREADS and threadpoolctl are
// obeyed) and gives small work to one thread; a positive request is taken literally. OpenMP's
// process-wide settings are never changed. A forked child runs on one thread, because libgomp's
// threads do not survive the fork.
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

// Default team size where a call asks for 0 threads; 0 restores OpenMP's own maximum.
void set_num_threads(int n);
int max_threads();

// From here on one thread only: for a forked child.
void forbid_threads();

// Threads for `work` flops when every thread should get at least `work_per_thread` of them.
int team_size(int requested, double work, double work_per_thread);

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
