// SPDX-License-Identifier: MIT
// Whole steps (evaluate and update) of gradient descent on L layers (dlnfast/dense_descent.hpp):
//   bench_dense_descent [--thin 2048,4096] [--outputs 10] [--thin-layers 3,4]
//                       [--square 512,1024,2048] [--small 10,30,64,100,256]
// and the options of harness.hpp. Thin networks are d wide and have K outputs. Their bytes in
// float64 are 24 (L - 1) d^2: every d x d layer is read twice and written once. Square ones have L
// = 3 and take 6 (L - 1) d^3 flops. Small ones are square and run on one thread as well as on
// `--threads`.
#include "dlnfast/dense_descent.hpp"

#include <memory>

#include "harness.hpp"
#include "plain_step.hpp"

using namespace dlnfast;

namespace {

constexpr double rate = 1e-3;

// A network, its stepper and the peer that steps it. The constructor checks the first step.
template <class T>
class Run {
 public:
  Run(const std::vector<Index>& widths, int n_threads) : network_(widths) {
    const std::vector<double> zeros(network_.weights.size());
    const std::vector<double> rates(network_.weights.size(), rate);
    Objective<T> objective;
    objective.target = network_.target;
    Context context;
    context.n_threads = n_threads;
    descent_ = std::make_unique<DenseDescent<T>>(network_.refs(), objective,
                                                 Rates{rates, zeros, zeros}, context);
    const bench::PlainStep<T> plain(network_);
    const std::vector<Matrix<T>> before = network_.weights;
    CHECK_NEAR(descent_->evaluate(), plain.loss, check::tolerance<T>(widths[0]) * plain.loss);
    descent_->update();
    for (std::size_t l = 0; l < before.size(); ++l) {
      bench::check_layer<T>(before[l], descent_->weights()[l].map(), plain.gradients[l], rate);
    }
  }

  double step() {
    const double loss = descent_->evaluate();
    descent_->update();
    return loss;
  }

 private:
  bench::Network<T> network_;
  std::unique_ptr<DenseDescent<T>> descent_;
};

template <class T>
void measure_thin(bench::Harness& harness, Index d, Index outputs, Index n_layers) {
  std::vector<Index> widths(static_cast<std::size_t>(n_layers), d);
  widths.push_back(outputs);
  const double bytes = 3.0 * sizeof(T) * double(n_layers - 1) * double(d) * double(d);
  Run<T> run(widths, harness.threads());
  harness.run<T>(
      {{"d", d}, {"K", outputs}, {"L", n_layers}},
      {{"thin step", step_flops(widths, best_pivot(widths)), bytes, [&] { run.step(); }}});
  CHECK(std::isfinite(run.step()));
}

template <class T>
void measure_square(bench::Harness& harness, Index d, bool small) {
  const std::vector<Index> widths(4, d);
  const double flops = 12.0 * double(d) * double(d) * double(d);
  Run<T> run(widths, harness.threads());
  std::vector<bench::Peer> peers{{"square step", flops, 0.0, [&] { run.step(); }}};
  std::unique_ptr<Run<T>> alone;
  if (small && harness.team() > 1) {
    alone = std::make_unique<Run<T>>(widths, 1);
    peers.push_back({"square step", flops, 0.0, [&] { alone->step(); }, 1.0, 1});
  }
  harness.run<T>({{"d", d}, {"L", 3}}, peers);
  CHECK(std::isfinite(run.step()));
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto thin = options.list("--thin", {2048, 4096});
  const auto thin_layers = options.list("--thin-layers", {3, 4}, 2);
  const Index outputs = options.integer("--outputs", 10);
  const auto square = options.list("--square", {512, 1024, 2048});
  const auto small = options.list("--small", {10, 30, 64, 100, 256});
  bench::Harness harness("dense_descent", options);
  return harness.each_precision([&](auto zero) {
    using T = decltype(zero);
    for (const Index d : thin) {
      for (const Index n_layers : thin_layers) measure_thin<T>(harness, d, outputs, n_layers);
    }
    for (const Index d : square) measure_square<T>(harness, d, false);
    for (const Index d : small) measure_square<T>(harness, d, true);
  });
}
