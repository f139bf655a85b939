// SPDX-License-Identifier: MIT
#include "dlnfast/product.hpp"

#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::Strided;

namespace {

template <class T>
Matrix<double> reference(const Matrix<T>& a, Op op_a, const Matrix<T>& b, Op op_b) {
  const Index m = op_a == Op::none ? a.rows() : a.cols();
  const Index k = op_a == Op::none ? a.cols() : a.rows();
  const Index n = op_b == Op::none ? b.cols() : b.rows();
  Matrix<double> c = Matrix<double>::Zero(m, n);
  for (Index i = 0; i < m; ++i) {
    for (Index l = 0; l < k; ++l) {
      const double x = op_a == Op::none ? a(i, l) : a(l, i);
      for (Index j = 0; j < n; ++j) c(i, j) += x * (op_b == Op::none ? b(l, j) : b(j, l));
    }
  }
  return c;
}

template <class T>
void all_shapes_match_reference() {
  const std::vector<Index> sizes{0, 1, 2, 3, 5, 7, 13, 16, 17, 31, 64, 65, 100};
  const double scales[][2] = {{1, 0}, {1, 1}, {-0.5, 2}, {2, -1}, {0, 1}, {0, 0}};
  int turn = 0;
  for (const Index m : sizes) {
    for (const Index k : sizes) {
      for (const Index n : sizes) {
        for (int ops = 0; ops < 4; ++ops) {
          const Op op_a = ops % 2 == 0 ? Op::none : Op::transpose;
          const Op op_b = ops / 2 == 0 ? Op::none : Op::transpose;
          const auto a = op_a == Op::none ? random_matrix<T>(m, k) : random_matrix<T>(k, m);
          const auto b = op_b == Op::none ? random_matrix<T>(k, n) : random_matrix<T>(n, k);
          const auto c = random_matrix<T>(m, n);
          const auto [alpha, beta] = scales[++turn % 6];
          const Matrix<double> wanted =
              alpha * reference<T>(a, op_a, b, op_b) + beta * c.template cast<double>();
          const Index gap = turn % 4 == 0 ? 0 : turn % 3 + 1;
          Strided<T> sa(a, gap), sb(b, gap), sc(c, gap);
          // The thread count cycles through all values for every shape.
          const int n_threads = std::vector<int>{1, 2, 7}[static_cast<std::size_t>(turn / 6) % 3];
          multiply<T>(T(alpha), sa.ref(), op_a, sb.ref(), op_b, T(beta), sc.ref(),
                      Context{n_threads, nullptr});
          CHECK_NEAR(distance(sc.value(), wanted), 0.0, 4 * check::tolerance<T>(k));
          CHECK(sc.is_intact());
        }
      }
    }
  }
}

// The same product on every team, at sizes where each thread has work.
template <class T>
void all_teams_match_reference() {
  for (const Index n : {1, 7, 100, 257}) {
    auto a = random_matrix<T>(n, 130);
    auto b = random_matrix<T>(130, 300);
    const auto wanted = reference<T>(a, Op::none, b, Op::none);
    for (const int n_threads : {0, 1, 2, 3, 7}) {
      Matrix<T> c(n, 300), ct(300, n);
      multiply<T>(a, Op::none, b, Op::none, c, Context{n_threads, nullptr});
      CHECK_NEAR(distance(c, wanted), 0.0, 4 * check::tolerance<T>(130));
      multiply<T>(b, Op::transpose, a, Op::transpose, ct, Context{n_threads, nullptr});
      CHECK_NEAR(distance(ct.transpose(), wanted), 0.0, 4 * check::tolerance<T>(130));
    }
  }
}

template <class T>
void beta_zero_overwrites() {
  for (const Index k : {0, 1, 9}) {
    Matrix<T> a = random_matrix<T>(20, k), b = random_matrix<T>(k, 30);
    Matrix<T> c = Matrix<T>::Constant(20, 30, std::numeric_limits<T>::quiet_NaN());
    multiply<T>(a, Op::none, b, Op::none, c, Context{});
    CHECK_NEAR(distance(c, reference<T>(a, Op::none, b, Op::none)), 0.0, check::tolerance<T>(k));
  }
}

template <class T>
void sizes_are_checked() {
  Matrix<T> a(3, 4), b(4, 5), c(3, 5);
  const auto product = [](Matrix<T> x, Op op_x, Matrix<T> y, Op op_y, Matrix<T> z) {
    multiply<T>(x, op_x, y, op_y, z, Context{});
  };
  CHECK_THROWS(product(a, Op::none, Matrix<T>(5, 5), Op::none, c), ShapeError);
  CHECK_THROWS(product(a, Op::transpose, b, Op::none, c), ShapeError);
  CHECK_THROWS(product(a, Op::none, b, Op::transpose, c), ShapeError);
  CHECK_THROWS(product(a, Op::none, b, Op::none, Matrix<T>(5, 3)), ShapeError);
  CHECK_THROWS(product(a, Op::none, b, Op::none, Matrix<T>(3, 4)), ShapeError);
  CHECK_THROWS(product(Matrix<T>(0, 4), Op::none, b, Op::none, c), ShapeError);
  CHECK_THROWS(product(a, Op::none, b, Op::none, Matrix<T>()), ShapeError);
}

}  // namespace

int main() {
  all_shapes_match_reference<double>();
  all_shapes_match_reference<float>();
  all_teams_match_reference<double>();
  all_teams_match_reference<float>();
  beta_zero_overwrites<double>();
  beta_zero_overwrites<float>();
  sizes_are_checked<double>();
  sizes_are_checked<float>();
  return check::result();
}
