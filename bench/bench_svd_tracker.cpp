// SPDX-License-Identifier: MIT
// An update of the tracker (dlnfast/svd_tracker.hpp) on a d x d matrix of noise plus k larger
// singular values, which changes slightly between updates:
//   bench_svd_tracker [--d 256,1024,4096] [--k 16]
// and the options of harness.hpp.
//   sweep products  the two products with p = k + 8 vectors that every dense update needs:
//                   4 p d^2 flops, and at least two reads of W
//   dense           an update whose drift is known and small: a sweep, ||W||_F, bounds, branches
//   certified       an update with a new certificate, from random vectors
//   factored        an update of W = s W_0 + U^T C V after a change of rank 10, in frames of 30 vectors
//   full            the whole decomposition, values only (sizes up to 512)
// Flops are those of the sweep, of which the other parts of an update are overhead.
#include "dlnfast/svd_tracker.hpp"

#include "dlnfast/basis.hpp"
#include "dlnfast/singular_values.hpp"
#include "harness.hpp"

using namespace dlnfast;

namespace {

template <class T>
Matrix<T> noise(Index m, Index n) {
  Matrix<T> x(m, n);
  Random random(3);
  random.fill(MatrixRef<T>(x));
  return x;
}

template <class T>
Matrix<T> orthonormal_rows(Index k, Index n, std::uint64_t seed) {
  Matrix<T> x(k, n);
  Random random(seed);
  random.fill(MatrixRef<T>(x));
  orthonormalize<T>(x, random, Context{});
  return x;
}

template <class T>
void measure(bench::Harness& harness, Index d, Index k) {
  const Matrix<T> left = orthonormal_rows<T>(k + 2, d, 11),
                  right = orthonormal_rows<T>(k + 2, d, 12);
  Matrix<T> w[2] = {noise<T>(d, d), Matrix<T>()};
  w[0] *= static_cast<T>(0.25 / std::sqrt(double(d)));
  for (Index i = 0; i < k; ++i) {
    const T value = static_cast<T>(3.0 - 2.0 * double(i) / double(k));
    w[0].noalias() += value * left.row(i).transpose() * right.row(i);
  }
  w[1] = w[0];
  const double moved = 1e-3;
  w[1].noalias() += static_cast<T>(moved) * left.row(k).transpose() * right.row(0);

  Context context;
  context.n_threads = harness.threads();
  const auto ref = [&](Index i) { return MatrixRef<const T>(w[i].data(), d, d); };
  TrackerSettings settings;
  settings.n_values = k;
  SvdTracker<T> known(d, d, settings), certified(d, d, settings);
  Index turn = 0;
  const Index p = k + settings.n_guards;
  const Matrix<T> block = orthonormal_rows<T>(p, d, 13);
  Matrix<T> image(p, d), back(p, d);

  // The factored form. W_0 need not be orthogonal here: the frames are closed under the updates,
  // and an update does not read W_0.
  Isometry isometry{1.0, 0.0, true};
  const Matrix<T> start = Matrix<T>::Identity(d, d);
  LowRankDrift<T> drift(MatrixRef<const T>(start.data(), d, d), isometry, 64);
  SvdTracker<T> factored(d, d, settings);
  const Matrix<T> pool = orthonormal_rows<T>(15, d, 14), other = orthonormal_rows<T>(15, d, 15);
  const Matrix<T> update_left = noise<T>(10, 15) * pool, update_right = noise<T>(10, 15) * other;

  const double area = double(d) * double(d);
  const double flops = 4.0 * double(p) * area, bytes = 2.0 * sizeof(T) * area;
  std::vector<bench::Peer> peers{
      {"sweep products", flops, bytes,
       [&] {
         block_times_transpose<T>(MatrixRef<const T>(block.data(), p, d), ref(turn ^= 1), image,
                                  context);
         block_times<T>(image, ref(turn), back, context);
       }},
      {"dense", flops, bytes, [&] { known.update(ref(turn ^= 1), moved, context); }},
      {"certified", flops, bytes,
       [&] { certified.update(ref(turn ^= 1), std::numeric_limits<double>::infinity(), context); }},
      {"factored", 0.0, 0.0, [&] {
         drift.update(0.999, 1e-3, MatrixRef<const T>(update_left.data(), 10, d),
                      MatrixRef<const T>(update_right.data(), 10, d), context);
         drift.flush(context);
         factored.update(drift, context);
       }}};
  Matrix<T> values(1, std::min<Index>(d, k));
  if (d <= 512) {
    peers.push_back({"full", 0.0, 0.0, [&] {
                       singular_values<T>(ref(turn ^= 1), MatrixRef<T>(values), {}, {}, context);
                     }});
  }
  known.update(ref(0), std::numeric_limits<double>::infinity(), context);
  for (const auto& peer : peers) peer.job();
  known.update(ref(0), moved, context);
  certified.update(ref(0), std::numeric_limits<double>::infinity(), context);
  const double rounding = check::tolerance<T>(d, 16.0) * 3.0;
  for (Index i = 0; i < k; ++i) {
    CHECK_NEAR(known.record().values[i], certified.record().values[i],
               known.record().errors[i] + certified.record().errors[i] + rounding);
    CHECK(certified.record().errors[i] < 0.05 * 3.0);
  }
  CHECK(drift.is_closed());
  harness.run<T>({{"d", d}, {"k", k}}, peers);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto sizes = options.list("--d", {256, 1024, 4096});
  const auto counts = options.list("--k", {16});
  bench::Harness harness("svd_tracker", options);
  return harness.each_precision([&](auto zero) {
    for (const Index d : sizes) {
      for (const Index k : counts) measure<decltype(zero)>(harness, d, k);
    }
  });
}
