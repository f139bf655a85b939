// SPDX-License-Identifier: MIT
#include "symmetric_eigen.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "dlnfast/safe_resize.hpp"
#include "dlnfast/simd.hpp"
#include "inner_product.hpp"
#include "numbers.hpp"

namespace dlnfast {
namespace {

using P = simd::Pack<double>;
using Vector = P::Vector;

constexpr int bisections = 56;  // of an interval of the size of ||T||: to its rounding error
constexpr int chains = 4;  // vectors of bisections at a time, which hide the latency of divisions
// Distance of values, relative to ||T||, below which their vectors must be orthogonalised.
constexpr double close = 1e-2;
constexpr int inverse_steps = 3;

void add_multiple(double* y, double factor, const double* x, Index n) {
  const Vector f = P::broadcast(factor);
  Index i = 0;
  for (; i + P::size <= n; i += P::size) P::store(y + i, P::load(y + i) + f * P::load(x + i));
  for (; i < n; ++i) y[i] += factor * x[i];
}

// Rows a_i -= v_i w + w_i v for `rows` rows, and y_i = a_i . next.
template <int rows>
void update_and_multiply(double* a, Index stride, const double* vi, const double* wi,
                         const double* v, const double* w, const double* next, Index n, double* y) {
  Vector fv[rows], fw[rows], sum[rows] = {};
  simd::unroll<rows>([&](auto i) DLNFAST_INLINE {
    fv[i] = P::broadcast(vi[i]);
    fw[i] = P::broadcast(wi[i]);
  });
  Index c = 0;
  for (; c + P::size <= n; c += P::size) {
    const Vector vc = P::load(v + c), wc = P::load(w + c), nc = P::load(next + c);
    simd::unroll<rows>([&](auto i) DLNFAST_INLINE {
      double* p = a + i * stride + c;
      const Vector x = P::load(p) - fv[i] * wc - fw[i] * vc;
      P::store(p, x);
      sum[i] += x * nc;
    });
  }
  for (int i = 0; i < rows; ++i) {
    double total = P::sum(sum[i]);
    double* p = a + i * stride;
    for (Index t = c; t < n; ++t) {
      p[t] -= vi[i] * w[t] + wi[i] * v[t];
      total += p[t] * next[t];
    }
    y[i] = total;
  }
}

// For every lane the number of eigenvalues of T above x.
template <int n_vectors>
void count_above(const double* diagonal, const double* squares, Index n,
                 const Vector (&x)[n_vectors], Vector (&count)[n_vectors]) {
  const Vector tiny = P::broadcast(std::numeric_limits<double>::min() / epsilon<double>());
  const Vector one = P::broadcast(1.0), zero{};
  Vector pivot[n_vectors];
  simd::unroll<n_vectors>([&](auto j) DLNFAST_INLINE {
    pivot[j] = P::broadcast(diagonal[0]) - x[j];
    count[j] = pivot[j] > zero ? one : zero;
  });
  for (Index i = 1; i < n; ++i) {
    const Vector d = P::broadcast(diagonal[i]), square = P::broadcast(squares[i - 1]);
    simd::unroll<n_vectors>([&](auto j) DLNFAST_INLINE {
      Vector q = pivot[j];
      q = (q < tiny && q > -tiny) ? -tiny : q;
      pivot[j] = d - x[j] - square / q;
      count[j] += pivot[j] > zero ? one : zero;
    });
  }
}

// T - c = P L U with partial pivoting; solves for one right-hand side after the other.
struct ShiftedFactors {
  std::vector<double> lower, pivot, upper, upper2;
  std::vector<char> swapped;

  explicit ShiftedFactors(Index n) : lower(n), pivot(n), upper(n), upper2(n), swapped(n) {}

  void factor(const std::vector<double>& d, const std::vector<double>& e, double shift,
              double floor) {
    const Index n = static_cast<Index>(d.size());
    for (Index i = 0; i < n; ++i) pivot[i] = d[i] - shift;
    for (Index i = 0; i + 1 < n; ++i) upper[i] = e[i];
    std::fill(upper2.begin(), upper2.end(), 0.0);
    for (Index i = 0; i + 1 < n; ++i) {
      const double below = e[i];
      swapped[i] = std::abs(below) > std::abs(pivot[i]);
      if (!swapped[i]) {
        if (std::abs(pivot[i]) < floor) pivot[i] = std::copysign(floor, pivot[i]);
        lower[i] = below / pivot[i];
        pivot[i + 1] -= lower[i] * upper[i];
      } else {
        lower[i] = pivot[i] / below;
        pivot[i] = below;
        const double right = upper[i];
        upper[i] = pivot[i + 1];
        pivot[i + 1] = right - lower[i] * upper[i];
        if (i + 2 < n) {
          upper2[i] = upper[i + 1];
          upper[i + 1] = -lower[i] * upper2[i];
        }
      }
    }
    if (std::abs(pivot[n - 1]) < floor) pivot[n - 1] = std::copysign(floor, pivot[n - 1]);
  }

  void solve(double* x, Index n) const {
    for (Index i = 0; i + 1 < n; ++i) {
      if (swapped[i]) std::swap(x[i], x[i + 1]);
      x[i + 1] -= lower[i] * x[i];
    }
    for (Index i = n - 1; i >= 0; --i) {
      double value = x[i];
      if (i + 1 < n) value -= upper[i] * x[i + 1];
      if (i + 2 < n) value -= upper2[i] * x[i + 2];
      x[i] = value / pivot[i];
    }
  }
};

// Scales x to length 1; false where it is zero.
bool normalize(double* x, Index n) {
  double largest = 0.0;
  for (Index i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  if (!(largest > 0.0) || !std::isfinite(largest)) return false;
  for (Index i = 0; i < n; ++i) x[i] /= largest;
  const double length = std::sqrt(inner_product(x, x, n));
  for (Index i = 0; i < n; ++i) x[i] /= length;
  return true;
}

}  // namespace

void SymmetricEigen::find_values(Matrix<double>& a, Index p) {
  tridiagonalize(a);
  bisect(p);
}

void SymmetricEigen::find_vectors(const Matrix<double>& a, Random& random) {
  safe_resize(vectors_, static_cast<Index>(values_.size()), a.rows());
  iterate_inversely(random);
  apply_reflections(a);
}

void SymmetricEigen::tridiagonalize(Matrix<double>& a) {
  const Index n = a.rows();
  diagonal_.assign(n, 0.0);
  off_diagonal_.assign(std::max<Index>(n - 1, 0), 0.0);
  tau_.assign(n, 0.0);
  // The pending update of rows and columns >= j: a -= v w^T + w v^T.
  std::vector<double> v(n, 0.0), w(n, 0.0), next(n, 0.0), y(n, 0.0);
  for (Index j = 0; j < n; ++j) {
    double* row = a.data() + j * n;
    for (Index c = j; c < n; ++c) row[c] -= v[j] * w[c] + w[j] * v[c];
    diagonal_[j] = row[j];
    if (j + 1 == n) break;
    const Index first = j + 1, size = n - first;
    const double alpha = row[first];
    const double tail = inner_product(row + first + 1, row + first + 1, size - 1);
    if (tail == 0.0) {
      off_diagonal_[j] = alpha;
      if (size == 1) continue;  // the pending update reaches the last row
      std::fill(next.begin() + first, next.end(), 0.0);
    } else {
      const double beta = -std::copysign(std::sqrt(alpha * alpha + tail), alpha);
      off_diagonal_[j] = beta;
      tau_[j] = (beta - alpha) / beta;
      next[first] = row[first] = 1.0;
      const double scale = 1.0 / (alpha - beta);
      for (Index c = first + 1; c < n; ++c) next[c] = row[c] *= scale;
    }
    Index i = first;
    for (; i + 4 <= n; i += 4) {
      update_and_multiply<4>(a.data() + i * n + first, n, &v[i], &w[i], &v[first], &w[first],
                             &next[first], size, &y[i]);
    }
    for (; i < n; ++i) {
      update_and_multiply<1>(a.data() + i * n + first, n, &v[i], &w[i], &v[first], &w[first],
                             &next[first], size, &y[i]);
    }
    const double half = 0.5 * tau_[j] * tau_[j] * inner_product(&y[first], &next[first], size);
    for (Index c = first; c < n; ++c) {
      v[c] = next[c];
      w[c] = tau_[j] * y[c] - half * next[c];
    }
  }
}

void SymmetricEigen::bisect(Index p) {
  const Index n = static_cast<Index>(diagonal_.size());
  values_.assign(p, 0.0);
  std::vector<double> squares(std::max<Index>(n - 1, 0));
  double low = infinity, high = -infinity;
  for (Index i = 0; i < n; ++i) {
    const double left = i > 0 ? std::abs(off_diagonal_[i - 1]) : 0.0;
    const double right = i + 1 < n ? std::abs(off_diagonal_[i]) : 0.0;
    low = std::min(low, diagonal_[i] - left - right);
    high = std::max(high, diagonal_[i] + left + right);
    if (i + 1 < n) squares[i] = right * right;
  }
  constexpr int lanes = chains * P::size;
  for (Index begin = 0; begin < p; begin += lanes) {
    Vector lows[chains], highs[chains], rank[chains], middle[chains], count[chains];
    simd::unroll<chains>([&](auto j) DLNFAST_INLINE {
      lows[j] = P::broadcast(low);
      highs[j] = P::broadcast(high);
      for (int lane = 0; lane < P::size; ++lane) {
        rank[j][lane] = static_cast<double>(std::min(begin + j * P::size + lane, p - 1));
      }
    });
    for (int step = 0; step < bisections; ++step) {
      simd::unroll<chains>([&](auto j) DLNFAST_INLINE { middle[j] = 0.5 * (lows[j] + highs[j]); });
      count_above<chains>(diagonal_.data(), squares.data(), n, middle, count);
      simd::unroll<chains>([&](auto j) DLNFAST_INLINE {
        const auto is_below = count[j] > rank[j];
        lows[j] = is_below ? middle[j] : lows[j];
        highs[j] = is_below ? highs[j] : middle[j];
      });
    }
    for (Index i = begin; i < std::min<Index>(p, begin + lanes); ++i) {
      const Index j = (i - begin) / P::size, lane = (i - begin) % P::size;
      values_[i] = 0.5 * (lows[j][lane] + highs[j][lane]);
    }
  }
}

void SymmetricEigen::iterate_inversely(Random& random) {
  const Index p = static_cast<Index>(values_.size()), n = static_cast<Index>(diagonal_.size());
  double size = 0.0;
  for (const double x : diagonal_) size = std::max(size, std::abs(x));
  for (const double x : off_diagonal_) size = std::max(size, std::abs(x));
  const double floor = std::max(epsilon<double>() * size, std::numeric_limits<double>::min());
  ShiftedFactors factors(n);
  double shift = 0.0;
  Index group = 0;  // first of the values close to this one
  for (Index i = 0; i < p; ++i) {
    if (i > 0 && values_[i - 1] - values_[i] > close * size) group = i;
    // Equal shifts would give equal vectors_.
    shift = i > group ? std::min(values_[i], shift - 4.0 * floor) : values_[i];
    factors.factor(diagonal_, off_diagonal_, shift, floor);
    double* z = vectors_.data() + i * n;
    for (Index c = 0; c < n; ++c) z[c] = random.normal();
    for (int step = 0; step < inverse_steps; ++step) {
      normalize(z, n);
      factors.solve(z, n);
      normalize(z, n);
      for (int pass = 0; pass < 2; ++pass) {
        for (Index other = group; other < i; ++other) {
          const double* x = vectors_.data() + other * n;
          add_multiple(z, -inner_product(x, z, n), x, n);
        }
      }
      while (!normalize(z, n)) {
        for (Index c = 0; c < n; ++c) z[c] = random.normal();
      }
    }
  }
}

void SymmetricEigen::apply_reflections(const Matrix<double>& a) {
  const Index n = a.rows();
  for (Index j = n - 2; j >= 0; --j) {
    if (tau_[j] == 0.0) continue;
    const double* reflection = a.data() + j * n + j + 1;
    for (Index i = 0; i < vectors_.rows(); ++i) {
      double* x = vectors_.data() + i * n + j + 1;
      add_multiple(x, -tau_[j] * inner_product(x, reflection, n - j - 1), reflection, n - j - 1);
    }
  }
}

}  // namespace dlnfast
