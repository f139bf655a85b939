// SPDX-License-Identifier: MIT
// The five passes over a d x d matrix W with a thin block of K rows (dlnfast/thin_product.hpp):
//   bench_thin_product [--d 2048,4096] [--k 1,10,64]
// and the options of harness.hpp. Bytes are those of W alone: in float64 8 d^2 where it is read, 16
// d^2 where it is updated. Flops are 2 K d^2 for a product and 2 K d^2 for an update.
#include "dlnfast/thin_product.hpp"

#include "dlnfast/workspace.hpp"
#include "harness.hpp"

using namespace dlnfast;

namespace {

// Compares the norm of a difference with that of the expected matrix.
template <class T>
void check_near(const Matrix<T>& got, const Matrix<T>& wanted, double tolerance) {
  CHECK_NEAR(double((got - wanted).norm()), 0.0, tolerance * double(wanted.norm()));
}

template <class T>
void measure(bench::Harness& harness, Index d, Index k) {
  auto w = check::random_matrix<T>(d, d);
  auto left = check::random_matrix<T>(k, d), right = check::random_matrix<T>(k, d);
  Matrix<T> y(k, d);
  GradientStep<T> descent;
  descent.scale = T(0.5);
  descent.learning_rate = T(0.1);
  descent.weight_decay = T(1e-3);
  Workspace workspace;
  Context context;
  context.n_threads = harness.threads();
  context.workspace = &workspace;

  const double entries = double(d) * double(d), flops = 2.0 * double(k) * entries;
  const double read = sizeof(T) * entries;
  const std::vector<bench::Peer> peers{
      {"thin_times_transpose", flops, read, [&] { thin_times_transpose<T>(right, w, y, context); }},
      {"thin_times", flops, read, [&] { thin_times<T>(left, w, y, context); }},
      {"thin_times_transpose_and_descend", 2.0 * flops, 2.0 * read,
       [&] { thin_times_transpose_and_descend<T>(left, right, w, y, descent, context); }},
      {"thin_times_and_descend", 2.0 * flops, 2.0 * read,
       [&] { thin_times_and_descend<T>(left, right, w, y, descent, context); }},
      {"thin_descend", flops, 2.0 * read,
       [&] { thin_descend<T>(left, right, w, descent, context); }},
  };
  const Matrix<T> start = w;
  const Matrix<T> by_rows = right * start.transpose(), by_columns = left * start;
  Matrix<T> stepped = T(1 - 1e-4) * start;
  stepped.noalias() -= T(0.05) * left.transpose() * right;
  const Matrix<T>* products[] = {&by_rows, &by_columns, &by_rows, &by_columns, nullptr};
  for (std::size_t p = 0; p < peers.size(); ++p) {
    w = start;
    peers[p].job();
    if (products[p] != nullptr) check_near(y, *products[p], check::tolerance<T>(d));
    check_near(w, p < 2 ? start : stepped, p < 2 ? 0.0 : check::tolerance<T>(k));
  }
  descent.learning_rate = T(1e-6);  // W keeps its size over many thousands of calls
  harness.run<T>({{"d", d}, {"K", k}}, peers);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto sizes = options.list("--d", {2048, 4096});
  const auto blocks = options.list("--k", {1, 10, 64});
  bench::Harness harness("thin_product", options);
  return harness.each_precision([&](auto zero) {
    for (const Index d : sizes) {
      for (const Index k : blocks) measure<decltype(zero)>(harness, d, k);
    }
  });
}
