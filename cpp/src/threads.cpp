#include "dlnfast/threads.hpp"

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
  const double useful = std::max(1.0, work / work_per_thread);
  return static_cast<int>(std::min<double>(max_threads(), useful));
}

}  // namespace dlnfast
