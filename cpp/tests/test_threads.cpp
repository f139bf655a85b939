// SPDX-License-Identifier: MIT
#include "dlnfast/threads.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "dlnfast/singular_values.hpp"

using namespace dlnfast;
using check::random_matrix;

namespace {

void exceptions_leave_a_region() {
  for (const int team : {1, 2, 7}) {
    const auto all = [](int, int) { throw std::runtime_error("all"); };
    CHECK_THROWS(parallel(team, all), std::runtime_error);
    const auto last = [](int member, int size) {
      if (member == size - 1) throw std::out_of_range("last");
    };
    CHECK_THROWS(parallel(team, last), std::out_of_range);
    std::atomic<int> n{0};  // and the next region works
    parallel(team, [&](int, int) { ++n; });
    CHECK(n >= 1 && n <= team);
    CHECK(n == (has_openmp() ? team : 1));
  }
}

// Returns the total time of steps on a machine where a team of n takes time[n] seconds per step.
double run_steps(TeamChoice& choice, int steps, const std::vector<double>& time) {
  double total = 0.0;
  for (int t = 0; t < steps; ++t) {
    const double seconds = time[static_cast<std::size_t>(choice.size())];
    total += seconds;
    choice.record_time(seconds);
  }
  return total;
}

void team_choice_follows_step_times() {
  const std::vector<double> quiet{0, 1.0, 0.52, 0.4, 0.28}, busy{0, 1.1, 3.0, 3.0, 3.0};
  TeamChoice one(1);
  run_steps(one, 50, quiet);
  CHECK(one.size() == 1);
  for (const int largest : {2, 4}) {
    TeamChoice choice(largest);
    CHECK(choice.size() == largest);
    const double full = quiet[static_cast<std::size_t>(largest)];
    const double half = quiet[static_cast<std::size_t>(largest / 2)];
    CHECK_NEAR(run_steps(choice, 1000, quiet), 999 * full + half, 1e-9);
    // Another program starts, and ends again.
    CHECK(run_steps(choice, 1000, busy) < 1.2 * 1000 * busy[1]);
    run_steps(choice, 4000, quiet);
    CHECK(choice.size() == largest);
    // Another program runs from the start.
    TeamChoice late(largest);
    CHECK(run_steps(late, 1000, busy) < 1.2 * 1000 * busy[1]);
  }
}

// Short steps; only every tenth falls into the other program's time slice.
void team_choice_detects_rare_slow_steps() {
  TeamChoice choice(2);
  double total = 0.0;
  for (int t = 0; t < 5000; ++t) {
    const double seconds = choice.size() == 1 ? 0.2e-3 : (t % 10 == 0 ? 8e-3 : 0.12e-3);
    total += seconds;
    choice.record_time(seconds);
  }
  CHECK(choice.size() == 1);
  CHECK(total < 1.25 * 5000 * 0.2e-3);
}

void share_covers_everything_once() {
  for (int trial = 0; trial < 20000; ++trial) {
    const Index n = check::pick(300);
    const Index grain = 1 + check::pick(20);
    const int team = 1 + static_cast<int>(check::pick(12));
    Index next = 0;
    for (int member = 0; member < team; ++member) {
      const Share s = share(n, grain, member, team);
      // Parts are contiguous and whole multiples of the grain, except for the last.
      CHECK(s.begin <= s.end);
      if (s.begin == s.end) continue;
      CHECK(s.begin == next);
      CHECK(s.begin % grain == 0);
      CHECK(s.end == n || s.end % grain == 0);
      next = s.end;
    }
    CHECK(next == n);
  }
  const Share large = share(Index(1) << 40, 64, 6, 7);
  CHECK(large.end == Index(1) << 40);
}

void every_member_runs_once() {
  for (const int team : {1, 2, 5}) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(team));
    parallel(team, [&](int member, int size) {
      if (size <= team && member >= 0 && member < size) ++seen[static_cast<std::size_t>(member)];
    });
    for (int i = 0; i < team; ++i) CHECK(seen[i] == (has_openmp() || i == 0 ? 1 : 0));
  }
}

void team_sizes_follow_requests() {
  set_num_threads(0);
  const int all = max_threads();
  CHECK(all >= 1);
  if (!has_openmp()) {
    CHECK(all == 1);
    CHECK(team_size(7, 1e18, 1.0) == 1);
    return;
  }
  for (const int n : {1, 2, 7, 100}) CHECK(team_size(n, 1.0, 1e9) == n);  // used as it is
  CHECK(team_size(0, 0.0, 1e6) == 1);
  CHECK(team_size(0, 1e5, 1e6) == 1);
  CHECK(team_size(0, 1e18, 1e6) == all);
  set_num_threads(5);
  CHECK(max_threads() == 5);
  CHECK(team_size(0, 3.5e6, 1e6) == 3);
  CHECK(team_size(0, 1e300, 1e-300) == 5);
  CHECK(team_size(2, 1e9, 1e6) == 2);
  CHECK(team_size(-3, 1e9, 1e6) == 3);
  CHECK(team_size(std::numeric_limits<int>::min(), 1e9, 1e6) == 5);
  // OpenMP would terminate the process.
  CHECK(team_size(4096, 1.0, 1.0) == 4096);
  CHECK_THROWS(team_size(4097, 1.0, 1.0), std::invalid_argument);
  CHECK_THROWS(set_num_threads(4097), std::invalid_argument);
  CHECK(team_size(-3, 2e6, 1e6) == 2);
  CHECK(team_size(-9, 1e9, 1e6) == 5);
  set_num_threads(-3);
  CHECK(max_threads() == all);
}

#ifdef _OPENMP
// Other libraries in the process may set any OpenMP maximum.
void invalid_openmp_maxima_are_ignored() {
  set_num_threads(0);
  const int before = omp_get_max_threads();
  const int processors = std::clamp(omp_get_num_procs(), 1, 4096);
  for (const int n : {std::numeric_limits<int>::max(), 1 << 20, 4097}) {
    omp_set_num_threads(n);
    CHECK(max_threads() == processors);
    CHECK(team_size(0, 1e300, 1.0) == processors);
    CHECK(team_size(-3, 1e300, 1.0) == std::min(3, processors));
  }
  for (const int n : {0, -1, std::numeric_limits<int>::min()}) {
    omp_set_num_threads(n);
    CHECK(max_threads() >= 1 && max_threads() <= 4096);
    CHECK(team_size(0, 1e300, 1.0) == max_threads());
  }
  omp_set_num_threads(4096);
  CHECK(max_threads() == 4096);
  omp_set_num_threads(before);
}

// A region may get fewer threads than requested: inside another region, or by a limit.
void smaller_teams_give_equal_results() {
  Matrix<double> a = random_matrix<double>(150, 130), b = random_matrix<double>(130, 140);
  Matrix<double> alone(150, 140), inside(150, 140);
  multiply<double>(1.0, a, Op::none, b, Op::none, 0.0, MatrixRef<double>(alone),
                   Context{1, nullptr});
  inside.setZero();
#pragma omp parallel num_threads(2)
  {
#pragma omp single
    {
      multiply<double>(1.0, a, Op::none, b, Op::none, 0.0, MatrixRef<double>(inside),
                       Context{64, nullptr});
    }
  }
  CHECK(inside == alone);
}
#endif

struct Trained {
  std::vector<Matrix<double>> weights, cores;
  Matrix<double> values;
  double loss = 0.0;
};

// Runs both engines and a decomposition from a fixed start.
Trained train(const std::vector<Matrix<double>>& start, const Matrix<double>& wanted, int n_threads,
              int steps) {
  Trained result;
  const Context context{n_threads, nullptr};
  result.weights = start;
  Matrix<double> target = wanted;
  Objective<double> objective;
  objective.target = target;
  objective.loss_scale = 0.1;
  const std::size_t n_layers = start.size();
  const Rates rates{std::vector<double>(n_layers, 0.05), std::vector<double>(n_layers, 1e-3),
                    std::vector<double>(n_layers, 0.5)};
  std::vector<MatrixRef<double>> refs;
  for (auto& w : result.weights) refs.emplace_back(w);
  DenseDescent<double> dense(refs, objective, rates, context);
  for (int t = 0; t < steps; ++t) {
    result.loss += dense.evaluate();
    dense.update();
  }
  std::vector<Matrix<double>> cores;
  for (std::size_t l = 0; l < n_layers; ++l) cores.push_back(start[l].topLeftCorner(6, 6));
  Matrix<double> corner = wanted.topLeftCorner(6, 6);
  objective.target = corner;
  std::vector<MatrixRef<double>> core_refs;
  for (auto& c : cores) core_refs.emplace_back(c);
  const Family complement{0, 10.0, 1.0, std::vector<double>(n_layers, 0.3)};
  ReducedDescent<double> reduced(core_refs, objective, {complement}, rates, context);
  for (int t = 0; t < 20 * steps; ++t) {
    result.loss += reduced.evaluate();
    reduced.update();
  }
  for (std::size_t l = 0; l < n_layers; ++l) {
    result.cores.emplace_back(6, 6);
    reduced.copy_core(static_cast<Index>(l), result.cores.back().data());
  }
  result.values.resize(1, 8);
  singular_values<double>(MatrixRef<double>(result.weights[0]), result.values, {}, {}, context);
  return result;
}

// Concurrent runs give the same result as a single run, bit for bit.
void concurrent_runs_match_a_single_run() {
  std::vector<Matrix<double>> start;
  for (int l = 0; l < 3; ++l) start.push_back(random_matrix<double>(70, 70, 0.1));
  const Matrix<double> target = random_matrix<double>(70, 70);
  for (const int n_threads : {1, 2}) {
    const Trained alone = train(start, target, n_threads, 10);
    std::vector<Trained> results(6);
    std::vector<std::thread> threads;
    for (auto& result : results) {
      threads.emplace_back([&] { result = train(start, target, n_threads, 10); });
    }
    for (auto& thread : threads) thread.join();
    for (const Trained& result : results) {
      CHECK(result.loss == alone.loss);
      CHECK(result.values == alone.values);
      for (std::size_t l = 0; l < start.size(); ++l) {
        CHECK(result.weights[l] == alone.weights[l]);
        CHECK(result.cores[l] == alone.cores[l]);
      }
    }
  }
}

// Must be the last test, because it cannot be undone.
void forbid_threads_is_permanent() {
  forbid_threads();
  CHECK(max_threads() == 1);
  CHECK(team_size(7, 1e9, 1.0) == 1);
  CHECK(team_size(0, 1e9, 1.0) == 1);
  set_num_threads(4);
  CHECK(max_threads() == 1);
}

}  // namespace

int main() {
  exceptions_leave_a_region();
  team_choice_follows_step_times();
  team_choice_detects_rare_slow_steps();
  share_covers_everything_once();
  every_member_runs_once();
  team_sizes_follow_requests();
#ifdef _OPENMP
  invalid_openmp_maxima_are_ignored();
  smaller_teams_give_equal_results();
#endif
  concurrent_runs_match_a_single_run();
  forbid_threads_is_permanent();
  return check::result();
}
