// SPDX-License-Identifier: MIT
// Products of square matrices (dlnfast/product.hpp), each operand as it is (N) or transposed (T):
//   bench_product [--d 256,512,1024,2048]
// and the options of harness.hpp. Bytes are those of two operands and the result, once each.
#include "dlnfast/product.hpp"

#include "dlnfast/workspace.hpp"
#include "harness.hpp"

using namespace dlnfast;

namespace {

struct Kind {
  const char* name;
  Op op_a, op_b;
};
constexpr Kind kinds[] = {{"multiply NN", Op::none, Op::none},
                          {"multiply NT", Op::none, Op::transpose},
                          {"multiply TN", Op::transpose, Op::none},
                          {"multiply TT", Op::transpose, Op::transpose}};

template <class T>
void measure(bench::Harness& harness, Index d) {
  auto a = check::random_matrix<T>(d, d), b = check::random_matrix<T>(d, d);
  Matrix<T> c(d, d);
  const double size = double(d), bytes = 3.0 * sizeof(T) * size * size;
  Workspace workspace;
  Context context;
  context.n_threads = harness.threads();
  context.workspace = &workspace;
  std::vector<bench::Peer> peers;
  for (const Kind& kind : kinds) {
    const auto job = [&, kind] { multiply<T>(a, kind.op_a, b, kind.op_b, c, context); };
    job();
    for (int s = 0; s < 20; ++s) {  // compares some entries with plain sums
      const Index i = check::pick(d), j = check::pick(d);
      double wanted = 0.0;
      for (Index l = 0; l < d; ++l) {
        wanted += double(kind.op_a == Op::none ? a(i, l) : a(l, i)) *
                  double(kind.op_b == Op::none ? b(l, j) : b(j, l));
      }
      CHECK_NEAR(double(c(i, j)), wanted, 4 * check::tolerance<T>(d));
    }
    peers.push_back({kind.name, 2.0 * size * size * size, bytes, job});
  }
  harness.run<T>({{"d", d}}, peers);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto sizes = options.list("--d", {256, 512, 1024, 2048});
  bench::Harness harness("product", options);
  return harness.each_precision([&](auto zero) {
    for (const Index d : sizes) measure<decltype(zero)>(harness, d);
  });
}
