// SPDX-License-Identifier: MIT
#include "drift_meter.hpp"

#include <cmath>

#include "dlnfast/safe_resize.hpp"
#include "numbers.hpp"

namespace dlnfast {
namespace {

constexpr double least_entries = 1 << 20;
constexpr double most_bytes = 1 << 28;
// Share of the tolerance that one update may use up.
constexpr double most_drift = 0.25;
constexpr double rounding = 1e-9;

}  // namespace

template <class T>
DriftMeter<T>::DriftMeter(Index m, Index n, const TrackerSettings& settings)
    : tolerance_(settings.tolerance) {
  const double entries = static_cast<double>(m) * static_cast<double>(n);
  is_used_ = entries >= least_entries && entries * sizeof(T) <= most_bytes &&
             tolerance_ > krylov_tolerance;
}

template <class T>
double DriftMeter<T>::measure(MatrixRef<const T> w, std::int64_t number, const Context& context) {
  if (!is_used_ || !schedule_.is_due(number)) return infinity;
  if (copy_.rows() == 0) {
    safe_assign(copy_, w.map());
    return infinity;
  }
  return replace_and_measure<T>(MatrixRef<T>(copy_), w, context) * (1.0 + rounding);
}

template <class T>
void DriftMeter<T>::report(double distance, double largest_value, std::int64_t number) {
  if (!std::isfinite(distance)) return;
  const bool helped = distance <= most_drift * tolerance_ * largest_value;
  schedule_.report(helped, number);
  if (!helped) reset();
}

template class DriftMeter<float>;
template class DriftMeter<double>;

}  // namespace dlnfast
