// SPDX-License-Identifier: MIT
// Many small runs in one batch, compared with the same runs one by one, per run and step:
//   bench_batch_descent [--size 6] [--layers 3] [--runs 1000] [--steps 2000]
// and the options of harness.hpp. The losses are compared first. The line below each group is the
// speedup of the batch, in elapsed time and in processor time of all threads, which is more
// reliable on a busy machine. Flops are those of the cores.
#include "dlnfast/batch_descent.hpp"

#include <cstdint>
#include <random>

#include "dlnfast/dense_descent.hpp"
#include "dlnfast/recorders.hpp"
#include "dlnfast/reduced_descent.hpp"
#include "harness.hpp"

using namespace dlnfast;

namespace {

// Typical runs of a study: random cores of a small scale, and a random target for each run.
template <class T>
struct Study {
  Index n, size, n_layers, steps;
  std::vector<std::vector<T>> cores;
  std::vector<T> target;
  std::vector<double> rho, multiplicity, coupling, rate, decay, momentum, scale, floor;
  std::vector<double> loss;
  std::vector<std::vector<T>> core_records;
  std::vector<double> rho_records;
  std::vector<std::int64_t> counts;

  Study(Index n_, Index size_, Index n_layers_, Index steps_)
      : n(n_), size(size_), n_layers(n_layers_), steps(steps_) {
    std::mt19937_64 engine(20240607);
    std::normal_distribution<double> normal;
    const auto draw = [&](Index count, double deviation) {
      std::vector<T> values(static_cast<std::size_t>(count));
      for (T& v : values) v = static_cast<T>(deviation * normal(engine));
      return values;
    };
    const Index entries = size * size;
    const double unit = 1.0 / std::sqrt(static_cast<double>(size));
    for (Index l = 0; l < n_layers; ++l) {
      cores.push_back(draw(n * entries, 0.3 * unit));
      core_records.emplace_back(2 * n * entries);
    }
    target = draw(n * entries, unit);
    rho.assign(n * n_layers, 0.3);
    multiplicity.assign(n, 294.0);
    coupling.assign(n, 1.0);
    rate.assign(n * n_layers, 0.02);
    decay.assign(n * n_layers, 0.0);
    momentum.assign(n * n_layers, 0.0);
    scale.assign(n, 1.0);
    floor.assign(n, 0.0);
    loss.assign(n * (steps + 1), 0.0);
    rho_records.assign(2 * n * n_layers, 0.0);
    counts.assign(2 * n, 0);
  }

  Schedule schedule() const { return {steps, steps, -1.0}; }

  void run_batch(int n_threads) {
    Batch<T> batch;
    BatchRecords<T> records;
    for (Index l = 0; l < n_layers; ++l) {
      batch.cores.push_back({cores[l].data(), n, size, size});
      records.core_records.push_back({core_records[l].data(), {n, 2, size, size}});
    }
    batch.target = {target.data(), n, size, size};
    batch.families = {{0, n_layers}};
    batch.rho = {rho.data(), n, n_layers};
    batch.multiplicity = {multiplicity.data(), n, 1};
    batch.coupling = {coupling.data(), n, 1};
    batch.learning_rate = {rate.data(), n, n_layers};
    batch.weight_decay = {decay.data(), n, n_layers};
    batch.momentum = {momentum.data(), n, n_layers};
    batch.loss_scale = {scale.data(), n, 1};
    batch.loss_floor = {floor.data(), n, 1};
    records.loss = {loss.data(), n, steps + 1};
    records.rho_records = {rho_records.data(), n, 2, n_layers};
    records.counts = {counts.data(), n, 2};
    Context context;
    context.n_threads = n_threads;
    batch_descent(batch, schedule(), records, context);
  }

  void run_single() {
    const Index entries = size * size;
    Monitor monitor;
    Context context;
    context.n_threads = 1;
    context.monitor = &monitor;
    for (Index run = 0; run < n; ++run) {
      std::vector<std::vector<T>> own;
      std::vector<MatrixRef<T>> refs;
      ReducedRecords<T> out;
      for (Index l = 0; l < n_layers; ++l) {
        const auto begin = cores[l].begin() + run * entries;
        own.emplace_back(begin, begin + entries);
        refs.emplace_back(own.back().data(), size, size);
        out.cores.push_back({core_records[l].data() + 2 * run * entries, {2, size, size}});
      }
      out.rho = {rho_records.data() + 2 * run * n_layers, {2, n_layers}};
      Objective<T> objective;
      objective.target = {target.data() + run * entries, size, size};
      objective.loss_scale = scale[run];
      objective.loss_floor = floor[run];
      const auto row = [&](const std::vector<double>& v) {
        return std::vector<double>(v.begin() + run * n_layers, v.begin() + (run + 1) * n_layers);
      };
      ReducedDescent<T> stepper(refs, objective, {{0, multiplicity[run], coupling[run], row(rho)}},
                                {row(rate), row(decay), row(momentum)}, context);
      ReducedRecorder<T> recorder(stepper, out, schedule());
      std::int64_t record_steps[2];
      std::int64_t* c = counts.data() + 2 * run;
      c[0] = c[1] = 0;
      descend(stepper, recorder, schedule(),
              {loss.data() + run * (steps + 1), record_steps, c, c + 1}, monitor);
    }
  }
};

template <class T>
void measure(bench::Harness& harness, Index size, Index n_layers, Index runs, Index steps) {
  const int team = harness.team();
  Study<T> study(runs, size, n_layers, steps);
  study.run_single();
  const std::vector<double> wanted = study.loss;
  study.run_batch(team);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    CHECK_NEAR(study.loss[i], wanted[i], (sizeof(T) == 4 ? 1e-3 : 1e-9) * (1.0 + wanted[i]));
  }

  const double units = double(runs) * double(steps);
  const double flops =
      step_flops(std::vector<Index>(static_cast<std::size_t>(n_layers + 1), size), n_layers);
  std::vector<bench::Peer> peers{
      {"one by one", flops, 0.0, [&] { study.run_single(); }, units, 1},
      {"batch", flops, 0.0, [&] { study.run_batch(1); }, units, 1},
  };
  if (team > 1) peers.push_back({"batch", flops, 0.0, [&] { study.run_batch(team); }, units, team});
  const auto times =
      harness.run<T>({{"size", size}, {"L", n_layers}, {"runs", runs}, {"steps", steps}}, peers);
  for (std::size_t p = 1; p < peers.size(); ++p) {
    std::printf("one by one / batch on %d: elapsed %.2f, processor %.2f\n", peers[p].threads,
                bench::median(times[0].elapsed) / bench::median(times[p].elapsed),
                bench::median(times[0].processor) / bench::median(times[p].processor));
  }
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const Index size = options.integer("--size", 6);
  const Index n_layers = options.integer("--layers", 3);
  const Index runs = options.integer("--runs", 1000);
  const Index steps = options.integer("--steps", 2000);
  bench::Harness harness("batch_descent", options);
  return harness.each_precision(
      [&](auto zero) { measure<decltype(zero)>(harness, size, n_layers, runs, steps); });
}
