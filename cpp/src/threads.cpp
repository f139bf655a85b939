#include "dlnfast/threads.hpp"

#include <algorithm>
#include <atomic>

namespace dlnfast {
namespace {

std::atomic<int> default_threads{0};
std::atomic<bool> single_threaded{false};

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void set_num_threads(int n) { default_threads = std::max(n, 0); }

void forbid_threads() { single_threaded = true; }

int max_threads() {
  if (single_threaded) return 1;
#ifdef _OPENMP
  const int n = default_threads;
  return n > 0 ? n : omp_get_max_threads();
#else
  return 1;
#endif
}

int team_size(int requested, double work, double work_per_thread) {
  if (single_threaded || !has_openmp()) return 1;
  if (requested > 0) return requested;
  const int most = requested < 0 ? std::min(-requested, max_threads()) : max_threads();
  const double useful = std::max(1.0, work / work_per_thread);
  return static_cast<int>(std::min<double>(most, useful));
}

void TeamChoice::took(double seconds) {
  if (largest_ == 1) return;
  elapsed_ += seconds;
  if (first_) {  // starts threads and touches memory
    first_ = false;
    return;
  }
  if (trial_steps_ > 0) {
    trial_slowest_ = std::max(trial_slowest_, seconds);
    trial_total_ += seconds;
    if (--trial_steps_ == 0) judge();
    return;
  }
  recent_[n_recent_++] = seconds;
  if (n_recent_ < window) return;
  n_recent_ = 0;
  std::sort(recent_, recent_ + window);
  usual_ = recent_[window / 2];
  best_ = best_ > 0.0 ? std::min(best_, usual_) : usual_;
  if (size_ > 1 && (!smaller_tried_ || usual_ > 1.25 * best_)) {
    smaller_tried_ = true;
    try_team(size_ / 2, 1);
  } else if (size_ < largest_ && elapsed_ >= next_larger_) {
    try_team(std::min(2 * size_, largest_), 3);
  }
}

void TeamChoice::try_team(int size, int steps) {
  trial_size_ = size;
  trial_steps_ = steps;
  trial_slowest_ = 0.0;
  trial_total_ = 0.0;
}

void TeamChoice::judge() {
  const bool larger = trial_size_ > size_;
  const bool better = trial_slowest_ < 0.9 * usual_;
  if (larger) {
    // Trials of larger teams take at most a tenth of the time.
    patience_ = better ? 0.0 : std::max(2.0 * patience_, 10.0 * trial_total_);
  }
  if (!better && !larger && trial_size_ > 1 && trial_slowest_ < 1.4 * usual_) {
    // Half of the team did nearly as well: the others may be in the way.
    return try_team(trial_size_ / 2, 1);
  }
  if (better) {
    size_ = trial_size_;
    best_ = 0.0;
    smaller_tried_ = larger;
  }
  next_larger_ = elapsed_ + std::max(patience_, 10.0 * usual_);
}

}  // namespace dlnfast
