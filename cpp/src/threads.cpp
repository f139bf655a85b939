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

// A larger team is taken for a mistake: OpenMP ends the process where it cannot start one.
constexpr int most_threads = 4096;

int checked(int n) {
  if (n > most_threads) {
    throw std::invalid_argument(std::to_string(n) + " threads are asked for; wanted at most " +
                                std::to_string(most_threads));
  }
  return n;
}

#ifdef _OPENMP
// OpenMP's own maximum. libgomp keeps OMP_NUM_THREADS in an unsigned long and returns it as an int:
// for values beyond 2^31 it is negative, zero or as good as random. Kernels divide their work by the
// team, so that a team below 1 would do none of it.
int openmp_threads() {
  const int n = omp_get_max_threads();
  return n >= 1 && n <= most_threads ? n : std::clamp(omp_get_num_procs(), 1, most_threads);
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
  const int most =
      requested < 0 ? std::min(-std::max(requested, -most_threads), max_threads()) : max_threads();
  const double useful = std::max(1.0, work / work_per_thread);
  return static_cast<int>(std::min<double>(most, useful));
}

void TeamChoice::took(double seconds) {
  constexpr int window = 5;
  constexpr double window_time = 8e-3;
  constexpr double trial_time = 4e-3;
  if (largest_ == 1) return;
  elapsed_ += seconds;
  if (first_) {  // starts threads and touches memory
    first_ = false;
    return;
  }
  Stretch& stretch = trial_size_ > 0 ? trial_ : recent_;
  stretch.add(seconds);
  if (trial_size_ > 0) {
    if (trial_.covers(trial_steps_, trial_time)) judge();
    return;
  }
  if (!recent_.covers(window, window_time)) return;
  usual_ = recent_.mean();
  best_ = best_ > 0.0 ? std::min(best_, usual_) : usual_;
  const bool disturbed = usual_ > 1.3 * recent_.least && elapsed_ >= next_smaller_;
  recent_ = trial_ = {};
  if (size_ > 1 && (!smaller_tried_ || usual_ > 1.25 * best_ || disturbed)) {
    smaller_tried_ = true;
    next_smaller_ = elapsed_ + 0.05;
    trial_size_ = size_ / 2;
    trial_steps_ = 1;
  } else if (size_ < largest_ && elapsed_ >= next_larger_) {
    trial_size_ = std::min(2 * size_, largest_);
    trial_steps_ = 3;
  }
}

void TeamChoice::judge() {
  constexpr double least_wait = 0.15;
  const bool larger = trial_size_ > size_;
  const bool better = trial_.mean() < 0.9 * usual_;
  // Trials of larger teams take at most a tenth of the time.
  const double wait = std::max(2.0 * patience_, 10.0 * trial_.seconds);
  if (!better && !larger && trial_size_ > 1 && trial_.mean() < 1.4 * usual_) {
    // Half of the team did nearly as well: the others may be in the way.
    trial_size_ /= 2;
    trial_ = {};
    return;
  }
  if (larger && !better) {
    patience_ = wait;
  } else if (better && !larger) {
    // A larger team that did well for long is not held to have failed.
    patience_ = elapsed_ > next_larger_ + 4.0 * patience_ ? 0.0 : wait;
  }
  if (better) {
    size_ = trial_size_;
    best_ = 0.0;
    smaller_tried_ = larger;
  }
  next_larger_ = elapsed_ + std::max({patience_, 10.0 * usual_, least_wait});
  trial_size_ = 0;
}

}  // namespace dlnfast
