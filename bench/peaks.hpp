// SPDX-License-Identifier: MIT
// Work that measures the peak performance of a team of threads: multiply-adds on registers only,
// the package's own product of matrices, and a = b + s c on arrays larger than the caches.
#pragma once

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

namespace bench {

using dlnfast::Index;
using dlnfast::Matrix;

template <class T>
class PeakWork {
 public:
  explicit PeakWork(int team)
      : team_(team),
        sums_(static_cast<std::size_t>(team)),
        left_(check::random_matrix<T>(d, d)),
        right_(check::random_matrix<T>(d, d)),
        product_(d, d) {
    for (Matrix<T>& swept : swept_) swept.resize(1, n);
    sweep([](T* x, T* y, T* z, Index count) {  // first touch: the pages of each thread are near it
      for (T* p : {x, y, z}) std::fill(p, p + count, T(1));
    });
  }

  double multiply_add_flops() const { return 2.0 * double(rounds) * n_chains * P::size * team_; }
  void multiply_adds() {
    dlnfast::parallel(team_, [&](int member, int) { sums_[member] = chains(T(0.5), T(1)); });
  }

  static constexpr Index d = 1024;
  static constexpr double gemm_flops = 2.0 * d * d * d;
  void gemm() {
    dlnfast::Context context;
    context.n_threads = team_;
    context.workspace = &workspace_;
    dlnfast::multiply<T>(left_, dlnfast::Op::none, right_, dlnfast::Op::none, product_, context);
  }

  static constexpr double triad_bytes = 3.0 * double(Index(128) << 20);
  void triad() {
    sweep([](T* __restrict x, const T* __restrict y, const T* __restrict z, Index count) {
      for (Index i = 0; i < count; ++i) x[i] = y[i] + T(0.5) * z[i];
    });
  }

 private:
  using P = dlnfast::simd::Pack<T>;
  static constexpr Index rounds = 100000;
  static constexpr int n_chains = dlnfast::simd::n_registers == 32 ? 24 : 12;  // hide the latency
  static constexpr Index n = static_cast<Index>(triad_bytes / 3.0 / sizeof(T));

  // x <- a x + b in as many registers as there are chains.
  DLNFAST_NOINLINE static T chains(T a, T b) {
    typename P::Vector x[n_chains] = {}, total = {};
    for (int s = 0; s < n_chains; ++s)
      x[s] += T(s);  // the compiler would compute equal chains once
    for (Index i = 0; i < rounds; ++i) {
      dlnfast::simd::unroll<n_chains>([&](auto s) DLNFAST_INLINE { x[s] = x[s] * a + b; });
    }
    dlnfast::simd::unroll<n_chains>([&](auto s) DLNFAST_INLINE { total += x[s]; });
    return P::sum(total);
  }

  template <class Body>
  void sweep(const Body& body) {
    dlnfast::parallel(team_, [&](int member, int team) {
      const dlnfast::Share mine = dlnfast::share(n, 4096, member, team);
      body(swept_[0].data() + mine.begin, swept_[1].data() + mine.begin,
           swept_[2].data() + mine.begin, mine.end - mine.begin);
    });
  }

  int team_;
  std::vector<T> sums_;
  dlnfast::Workspace workspace_;
  Matrix<T> left_, right_, product_, swept_[3];
};

}  // namespace bench
