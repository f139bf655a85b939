// SPDX-License-Identifier: MIT
// A step of the reduced engine (dlnfast/reduced_descent.hpp) as in a run, including the loss: L
// cores of 2 r x 2 r and one family of scalars through all layers. The cost does not depend on the
// width of the network.
//   bench_reduced_descent [--r 3,10] [--layers 3]
// and the options of harness.hpp; here --threads is 1 by default. Flops are those of the cores.
#include "dlnfast/reduced_descent.hpp"

#include "dlnfast/dense_descent.hpp"
#include "harness.hpp"
#include "plain_step.hpp"

using namespace dlnfast;

namespace {

constexpr double rate = 1e-3;

struct NoRecords final : Recorder {
  void record(Index, Index) override {}
};

template <class T>
void measure(bench::Harness& harness, Index r, Index n_layers) {
  const std::vector<Index> widths(static_cast<std::size_t>(n_layers + 1), 2 * r);
  bench::Network<T> network(widths);
  const std::vector<Matrix<T>> before = network.weights;
  const auto all = [&](double value) {
    return std::vector<double>(static_cast<std::size_t>(n_layers), value);
  };
  const Family family{0, 294.0, 1.0, all(0.3)};
  Objective<T> objective;
  objective.target = network.target;
  Monitor monitor;
  Context context;
  context.n_threads = harness.threads();
  context.monitor = &monitor;
  ReducedDescent<T> descent(network.refs(), objective, {family}, {all(rate), all(0.0), all(0.0)},
                            context);

  const bench::PlainStep<T> plain(network);
  const double gradient = std::pow(0.3, 2.0 * double(n_layers) - 1.0);
  const double loss = plain.loss + 0.5 * family.multiplicity * 0.3 * gradient;
  CHECK_NEAR(descent.evaluate(), loss, check::tolerance<T>(2 * r) * loss);
  descent.update();
  for (Index l = 0; l < n_layers; ++l) {
    Matrix<T> after(2 * r, 2 * r);
    descent.copy_core(l, after.data());
    bench::check_layer(before[l], after, plain.gradients[l], rate);
    CHECK_NEAR(descent.rho()[l], 0.3 - rate * gradient, 1e-15);
  }

  constexpr Index steps = 1000;
  NoRecords recorder;
  std::vector<double> losses(steps + 1);
  std::int64_t record_steps[2], n_losses = 0, n_records = 0;
  const auto run = [&] {
    n_records = 0;
    descend(descent, recorder, {steps, steps, -1.0},
            {losses.data(), record_steps, &n_losses, &n_records}, monitor);
  };
  const double flops = step_flops(widths, n_layers);
  harness.run<T>({{"r", r}, {"L", n_layers}}, {{"reduced step", flops, 0.0, run, steps}});
  CHECK(std::isfinite(losses.back()));
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto ranks = options.list("--r", {3, 10});
  const Index n_layers = options.integer("--layers", 3);
  bench::Harness harness("reduced_descent", options, 1);
  return harness.each_precision([&](auto zero) {
    for (const Index r : ranks) measure<decltype(zero)>(harness, r, n_layers);
  });
}
