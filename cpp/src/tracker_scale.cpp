// SPDX-License-Identifier: MIT
#include "tracker_scale.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "dlnfast/safe_resize.hpp"
#include "numbers.hpp"

namespace dlnfast {
namespace {

// The factor and its inverse must be representable in type T.
template <class T>
constexpr int limit_exponent = sizeof(T) == 8 ? 1000 : 120;

}  // namespace

template <class T>
bool TrackerScale<T>::choose(const LinearOperator<T>& w, double& norm, bool is_exact,
                             Random& random, const Context& context) {
  double size = std::isfinite(norm) ? norm : 0.0;
  if (!(size > 0.0) && !is_exact) {
    Matrix<T> x(1, w.cols()), y(1, w.rows());
    random.fill(MatrixRef<T>(x));
    w.apply(MatrixRef<T>(x), MatrixRef<T>(y), context);
    if (!y.allFinite()) {
      throw std::domain_error("products with the tracked matrix are not finite");
    }
    size = static_cast<double>(y.cwiseAbs().maxCoeff());
    if (size > 0.0) norm = nan;
  }
  const double before = factor_;
  const double now = size * factor_;
  if (size > 0.0 && (now < 0x1p-24 || now > 0x1p24)) {
    int exponent = 0;
    std::frexp(size, &exponent);
    factor_ = std::ldexp(1.0, std::clamp(-exponent, -limit_exponent<T>, limit_exponent<T>));
  }
  return factor_ != before;
}

template <class T>
MatrixRef<const T> TrackerScale<T>::scaled(MatrixRef<const T> w) {
  if (factor_ == 1.0) return w;
  safe_assign(scratch_, static_cast<T>(factor_) * w.map());
  return scratch_;
}

template <class T>
void TrackerScale<T>::convert(TrackerRecord& record) const {
  if (factor_ == 1.0) return;
  const double back = 1.0 / factor_;
  for (auto* list : {&record.values, &record.errors, &record.gaps}) {
    for (double& x : *list) x *= back;
  }
  for (double* x : {&record.norm, &record.tail, &record.drift, &record.rho, &record.rho_spread}) {
    *x *= back;
  }
  // A subnormal value was rounded, and so was its bound.
  for (double& x : record.errors) x += std::numeric_limits<double>::denorm_min();
  record.tail += std::numeric_limits<double>::denorm_min();
}

template class TrackerScale<float>;
template class TrackerScale<double>;

}  // namespace dlnfast
