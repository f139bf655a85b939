// SPDX-License-Identifier: MIT
#include "tracker_scale.hpp"

#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "views.hpp"

using namespace dlnfast;
using check::random_matrix;

namespace {

const Context context{1, nullptr};
const double nan = std::numeric_limits<double>::quiet_NaN();

// The unit is a power of two that brings W to size 1, and changes only if W is far from that.
template <class T>
void unit_follows_the_size() {
  Random random(1);
  TrackerScale<T> scale;
  const Matrix<T> start = random_matrix<T>(5, 4);
  const auto choose = [&](const Matrix<T>& w) {
    double norm = static_cast<double>(w.norm());
    return scale.choose(MatrixOperator<T>(view(w)), norm, true, random, context);
  };
  CHECK(!choose(start) && scale.factor() == 1.0);
  CHECK(!choose(Matrix<T>::Zero(5, 4)) && scale.factor() == 1.0);
  for (const double size : {0x1p30, 0x1p-30, 0x1p60}) {
    const Matrix<T> w = static_cast<T>(size) * start;
    CHECK(choose(w));
    const double unit = scale.factor();
    CHECK(unit * w.template cast<double>().norm() >= 0.5 && unit * w.norm() <= 2.0);
    int exponent = 0;
    CHECK(std::frexp(unit, &exponent) == 0.5);
    CHECK(!choose(Matrix<T>(T(1000) * w)) && scale.factor() == unit);
    // Products with W, and W itself, in this unit.
    const Matrix<T> x = random_matrix<T>(2, 4), y = random_matrix<T>(2, 5);
    Matrix<T> forth(2, 5), back(2, 4);
    const MatrixOperator<T> whole(view(w));
    const ScaledOperator<T> scaled = scale.scaled(whole);
    CHECK(scaled.rows() == 5 && scaled.cols() == 4);
    scaled.apply(view(x), MatrixRef<T>(forth), context);
    scaled.apply_transpose(view(y), MatrixRef<T>(back), context);
    const Matrix<T> expected = static_cast<T>(unit) * w;
    const double rounding = check::tolerance<T>(5);
    CHECK_NEAR(check::distance(forth, Matrix<T>(x * expected.transpose())), 0.0, rounding);
    CHECK_NEAR(check::distance(back, Matrix<T>(y * expected)), 0.0, rounding);
    CHECK(check::distance(Matrix<T>(scale.scaled(view(w)).map()), expected) == 0.0);
    scale.release();
  }
}

// The size of an operator without a norm is measured by a product.
void unknown_norms_are_measured() {
  Random random(1);
  const Matrix<double> w = 0x1p40 * random_matrix<double>(5, 4), zero = Matrix<double>::Zero(5, 4);
  for (const double known : {nan, 0.0}) {
    TrackerScale<double> scale;
    double norm = known;
    CHECK(scale.choose(MatrixOperator<double>(view(w)), norm, false, random, context));
    CHECK(scale.factor() < 0x1p-30 && std::isnan(norm));
  }
  TrackerScale<double> scale;
  double norm = 0.0;
  CHECK(!scale.choose(MatrixOperator<double>(view(zero)), norm, false, random, context));
  CHECK(norm == 0.0);
  Matrix<double> bad = w;
  bad(2, 2) = nan;
  CHECK_THROWS(scale.choose(MatrixOperator<double>(view(bad)), norm, false, random, context),
               std::domain_error);
}

void records_are_converted() {
  Random random(1);
  TrackerScale<double> scale;
  Matrix<double> w = Matrix<double>::Constant(1, 1, 0x1p40);
  double norm = 0x1p40;
  CHECK(scale.choose(MatrixOperator<double>(view(w)), norm, true, random, context));
  TrackerRecord record;
  record.values = {1.0, 0.5};
  record.errors = {0.25, 0.25};
  record.gaps = {0.5, 0.5};
  record.norm = record.tail = record.drift = 1.0;
  record.vector_error = 0.125;
  scale.convert(record);
  const double back = 1.0 / scale.factor();
  CHECK(record.values[1] == 0.5 * back && record.errors[0] >= 0.25 * back);
  CHECK(record.gaps[0] == 0.5 * back && record.norm == back && record.drift == back);
  CHECK(record.tail >= back && record.vector_error == 0.125);
}

}  // namespace

int main() {
  unit_follows_the_size<double>();
  unit_follows_the_size<float>();
  unknown_norms_are_measured();
  records_are_converted();
  return check::result();
}
