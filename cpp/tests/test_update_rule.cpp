// SPDX-License-Identifier: MIT
#include "update_rule.hpp"

#include <Eigen/SVD>
#include <algorithm>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;

namespace {

template <class T>
Matrix<T> function_of_singular_values(const Matrix<T>& m, double (*f)(double)) {
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(m.template cast<double>(),
                                              Eigen::ComputeThinU | Eigen::ComputeThinV);
  const Eigen::VectorXd values = svd.singularValues().unaryExpr(f);
  return (svd.matrixU() * values.asDiagonal() * svd.matrixV().transpose()).template cast<T>();
}

const std::vector<std::pair<Index, Index>> shapes{{1, 1},  {2, 5},   {6, 6},   {7, 3},   {19, 20},
                                                  {32, 9}, {33, 33}, {41, 60}, {64, 50}, {50, 41}};

// The iteration applies its polynomial to every singular value, whatever kernel runs it.
template <class T>
void iteration_is_a_function_of_singular_values() {
  for (const auto& [rows, cols] : shapes) {
    Matrix<T> x = random_matrix<T>(rows, cols);
    x /= x.norm();
    const Matrix<T> wanted =
        function_of_singular_values<T>(x, +[](double s) { return newton_schulz(s, Optimizer()); });
    newton_schulz<T>(rows, cols)->iterate(x, Optimizer(), Context{1, nullptr});
    CHECK_NEAR(distance(x, wanted), 0.0, 500.0 * check::tolerance<T>(std::max(rows, cols)));
  }
}

// Values that count become 1, the others 0.
template <class T>
void polar_factors_leave_out_small_values() {
  for (const auto& [rows, cols] : shapes) {
    const Index rank = std::max<Index>(1, std::min(rows, cols) / 2);
    const Matrix<T> low_rank = random_matrix<T>(rows, rank) * random_matrix<T>(rank, cols);
    const double tolerance = sizeof(T) == 8 ? 1e-8 : 3e-4;
    Matrix<T> x = low_rank;
    const double largest = polar_factor<T>(MatrixRef<T>(x), 0.0, tolerance, Context{1, nullptr});
    const Eigen::JacobiSVD<Eigen::MatrixXd> svd(x.template cast<double>());
    CHECK(largest > 0.0);
    for (Index i = 0; i < std::min(rows, cols); ++i) {
      CHECK_NEAR(svd.singularValues()[i], i < rank ? 1.0 : 0.0, sizeof(T) == 8 ? 1e-12 : 1e-4);
    }
    // It is symmetric positive semidefinite times the factor: X = (X P^T) P.
    const Matrix<T> again = low_rank * x.transpose() * x;
    CHECK_NEAR(distance(again, low_rank), 0.0,
               (sizeof(T) == 8 ? 1e-12 : 1e-4) * double(low_rank.norm()));
    // Larger values elsewhere change which of these count.
    Matrix<T> none = low_rank;
    polar_factor<T>(MatrixRef<T>(none), 10.0 * largest / tolerance, tolerance, Context{1, nullptr});
    CHECK(none.norm() == T(0));
  }
}

void zero_matrices_have_zero_factors() {
  Matrix<double> x = Matrix<double>::Zero(5, 3);
  CHECK(polar_factor<double>(MatrixRef<double>(x), 0.0, 1e-8, Context{1, nullptr}) == 0.0);
  CHECK(x.norm() == 0.0);
}

void roots_are_inverse() {
  for (const Index n : {1, 2, 9, 40}) {
    const Matrix<double> g = random_matrix<double>(n, n + 2);
    Matrix<double> p = g * g.transpose();
    p.diagonal().array() += 1e-2;
    const Matrix<double> root = inverse_fourth_root(MatrixRef<double>(p), Context{1, nullptr});
    const Matrix<double> square = root * root;
    const Matrix<double> product = square * p * square, one = Matrix<double>::Identity(n, n);
    CHECK_NEAR(distance(product, one), 0.0, 1e-9);
  }
}

void settings_are_checked() {
  std::vector<Matrix<double>> weights{random_matrix<double>(3, 3), random_matrix<double>(3, 3)};
  std::vector<MatrixRef<double>> refs{weights[0], weights[1]};
  Rates rates;
  rates.learning_rate = rates.weight_decay = rates.momentum = {0.1, 0.1};
  rates.optimizer = Optimizer();
  rates.optimizer->rule = Rule::muon;
  CHECK_THROWS((UpdateRule<double>(refs, rates, {}, nullptr)), ShapeError);  // no direction_scale
  rates.optimizer->direction_scale = {1.0, 1.0};
  UpdateRule<double>(refs, rates, {}, nullptr);
  rates.optimizer->coefficients = {1.0};
  CHECK_THROWS((UpdateRule<double>(refs, rates, {}, nullptr)), ShapeError);
}

}  // namespace

int main() {
  iteration_is_a_function_of_singular_values<double>();
  iteration_is_a_function_of_singular_values<float>();
  polar_factors_leave_out_small_values<double>();
  polar_factors_leave_out_small_values<float>();
  zero_matrices_have_zero_factors();
  roots_are_inverse();
  settings_are_checked();
  return check::result();
}
