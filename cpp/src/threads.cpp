// SPDX-License-Identifier: MIT
#include "dlnfast/threads.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

namespace dlnfast {
namespace {

std::atomic<int> default_threads{0};
std::atomic<bool> single_threaded{false};

// Larger requests are errors: OpenMP terminates the process if it cannot start a team.
constexpr int thread_limit = 4096;

int checked(int n) {
  if (n > thread_limit) {
    throw std::invalid_argument(std::to_string(n) + " threads are requested; wanted at most " +
                                std::to_string(thread_limit));
  }
  return n;
}

#ifdef _OPENMP
// Returns OpenMP's maximum. libgomp stores OMP_NUM_THREADS in an unsigned long and returns it as an
// int, so values beyond 2^31 become negative, zero or arbitrary. Kernels divide their work by the
// team size, and would do none of it for a team below 1.
int openmp_threads() {
  const int n = omp_get_max_threads();
  return n >= 1 && n <= thread_limit ? n : std::clamp(omp_get_num_procs(), 1, thread_limit);
}
#endif

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void set_num_threads(int n) { default_threads = std::max(checked(n), 0); }

void forbid_threads() { single_threaded = true; }

int max_threads() {
  if (single_threaded) return 1;
#ifdef _OPENMP
  const int n = default_threads;
  return n > 0 ? n : openmp_threads();
#else
  return 1;
#endif
}

int team_size(int requested, double work, double work_per_thread) {
  checked(requested);
  if (single_threaded || !has_openmp()) return 1;
  if (requested > 0) return requested;
  const int available =
      requested < 0 ? std::min(-std::max(requested, -thread_limit), max_threads()) : max_threads();
  const double useful = std::max(1.0, work / work_per_thread);
  return static_cast<int>(std::min<double>(available, useful));
}

void TeamChoice::record_time(double seconds) {
  constexpr int window_steps = 5;
  constexpr double window_time = 8e-3;
  constexpr double trial_time = 4e-3;
  if (largest_ == 1) return;
  elapsed_ += seconds;
  if (first_) {  // includes thread start and page faults
    first_ = false;
    return;
  }
  Window& current = trial_size_ > 0 ? trial_ : recent_;
  current.add(seconds);
  if (trial_size_ > 0) {
    if (trial_.covers(trial_steps_, trial_time)) finish_trial();
    return;
  }
  if (!recent_.covers(window_steps, window_time)) return;
  recent_mean_ = recent_.mean();
  best_mean_ = best_mean_ > 0.0 ? std::min(best_mean_, recent_mean_) : recent_mean_;
  const bool disturbed = recent_mean_ > 1.3 * recent_.shortest && elapsed_ >= next_smaller_;
  recent_ = trial_ = {};
  if (size_ > 1 && (!smaller_tried_ || recent_mean_ > 1.25 * best_mean_ || disturbed)) {
    smaller_tried_ = true;
    next_smaller_ = elapsed_ + 0.05;
    trial_size_ = size_ / 2;
    trial_steps_ = 1;
  } else if (size_ < largest_ && elapsed_ >= next_larger_) {
    trial_size_ = std::min(2 * size_, largest_);
    trial_steps_ = 3;
  }
}

void TeamChoice::finish_trial() {
  constexpr double least_wait = 0.15;
  const bool larger = trial_size_ > size_;
  const bool better = trial_.mean() < 0.9 * recent_mean_;
  // Trials of larger teams take at most a tenth of the time.
  const double wait = std::max(2.0 * retry_wait_, 10.0 * trial_.seconds);
  if (!better && !larger && trial_size_ > 1 && trial_.mean() < 1.4 * recent_mean_) {
    // Half of the team was nearly as fast: more threads may share the occupied core, so try fewer.
    trial_size_ /= 2;
    trial_ = {};
    return;
  }
  if (larger && !better) {
    retry_wait_ = wait;
  } else if (better && !larger) {
    // A larger team that was fast for long does not count as failed.
    retry_wait_ = elapsed_ > next_larger_ + 4.0 * retry_wait_ ? 0.0 : wait;
  }
  if (better) {
    size_ = trial_size_;
    best_mean_ = 0.0;
    smaller_tried_ = larger;
  }
  next_larger_ = elapsed_ + std::max({retry_wait_, 10.0 * recent_mean_, least_wait});
  trial_size_ = 0;
}

}  // namespace dlnfast
