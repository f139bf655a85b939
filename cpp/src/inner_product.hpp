// SPDX-License-Identifier: MIT
// Inner product of two vectors in double precision.
#pragma once

#include "dlnfast/simd.hpp"
#include "dlnfast/types.hpp"

namespace dlnfast {

// Four independent vector sums, to reach memory bandwidth.
inline double inner_product(const double* a, const double* b, Index n) {
  using P = simd::Pack<double>;
  typename P::Vector sums[4] = {};
  Index j = 0;
  for (; j + 4 * P::size <= n; j += 4 * P::size) {
    simd::unroll<4>([&](auto i) DLNFAST_INLINE {
      sums[i] += P::load(a + j + i * P::size) * P::load(b + j + i * P::size);
    });
  }
  double total = P::sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < n; ++j) total += a[j] * b[j];
  return total;
}

}  // namespace dlnfast
