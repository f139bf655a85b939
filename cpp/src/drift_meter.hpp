// SPDX-License-Identifier: MIT
// Measures how far W has moved since the previous update, from a copy of it, if nobody knows. That takes one pass
// over W and the copy, and saves a random certificate of some ten passes over W while the distance is small.
#pragma once

#include <cstdint>

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "retry_schedule.hpp"

namespace dlnfast {

template <class T>
class DriftMeter {
 public:
  // For m x n matrices. Small ones are certified faster than they are copied and compared, copies of large ones
  // take too much memory, and with a small tolerance no distance is small enough.
  DriftMeter(Index m, Index n, const TrackerSettings& settings);

  // Returns a bound on ||W - W_before||_2 in update `number`; infinity without a copy of W_before. Copies W if
  // that may help.
  double measure(MatrixRef<const T> w, std::int64_t number, const Context& context);
  // Reports the result of an update. If the distance alone was too large for the tolerance, the next copy is made
  // some updates later (RetrySchedule).
  void report(double distance, double largest_value, std::int64_t number);
  // Forgets W, because an update did not read it.
  void reset() { copy_.resize(0, 0); }

 private:
  bool is_used_;
  double tolerance_;
  RetrySchedule schedule_;
  Matrix<T> copy_;
};

extern template class DriftMeter<float>;
extern template class DriftMeter<double>;

}  // namespace dlnfast
