// SPDX-License-Identifier: MIT
#include "dlnfast/completion.hpp"

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/thin_product.hpp"
#include "dlnfast/workspace.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::Strided;
using Widths = std::vector<Index>;
using Weights = std::vector<Matrix<double>>;

namespace {

template <class T>
constexpr double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());

const int teams[] = {1, 2, 7};

// The entries in one order.
template <class T>
struct Order {
  Index cols = 0;
  std::vector<std::int64_t> start{0};
  std::vector<std::int32_t> index;
  std::vector<T> values;

  Order() = default;
  // The entries of `all` where `mask` is not zero, row by row.
  Order(const Matrix<double>& mask, const Matrix<double>& all) : cols(mask.cols()) {
    for (Index i = 0; i < mask.rows(); ++i) {
      for (Index j = 0; j < mask.cols(); ++j) {
        if (mask(i, j) == 0.0) continue;
        index.push_back(static_cast<std::int32_t>(j));
        values.push_back(static_cast<T>(all(i, j)));
      }
      start.push_back(static_cast<std::int64_t>(index.size()));
    }
  }

  SparseRows<T> view() const {
    SparseRows<T> s;
    s.rows = static_cast<Index>(start.size()) - 1;
    s.cols = cols;
    s.size = static_cast<Index>(index.size());
    s.start = start.data();
    s.index = index.data();
    s.values = values.data();
    return s;
  }
  bool operator==(const Order& other) const {
    return cols == other.cols && start == other.start && index == other.index &&
           values == other.values;
  }
};

template <class T>
struct Observed {
  Order<T> rows, columns;

  Observed(const Matrix<double>& mask, const Matrix<double>& all)
      : rows(mask, all), columns(mask.transpose(), all.transpose()) {}
  ObservedEntries<T> view() const { return {rows.view(), columns.view()}; }
};

// Returns a mask with a fraction `density` of ones; a large mask also gets a full and an empty row,
// and a full and an empty column.
Matrix<double> random_mask(Index m, Index n, double density) {
  Matrix<double> mask = Matrix<double>::Zero(m, n);
  for (Index e = 0; e < mask.size(); ++e) {
    mask.data()[e] = 0.5 * (check::uniform() + 1.0) < density ? 1.0 : 0.0;
  }
  if (density == 0.0 || density == 1.0) return mask;
  if (m > 4) {
    mask.row(check::pick(m)).setOnes();
    mask.row(check::pick(m)).setZero();
  }
  if (n > 4) {
    mask.col(check::pick(n)).setOnes();
    mask.col(check::pick(n)).setZero();
  }
  return mask;
}

// Computes left, right and the loss with plain loops, and for each the sum of the magnitudes of its
// terms: a few roundings of that sum are allowed.
template <class T>
struct Products {
  Matrix<double> left, right, left_size, right_size;
  double loss = 0.0, loss_size = 0.0;

  Products(const Matrix<double>& mask, const Matrix<double>& values, const Matrix<T>& x,
           const Matrix<T>& y)
      : left(Matrix<double>::Zero(x.rows(), x.cols())),
        right(Matrix<double>::Zero(y.rows(), y.cols())),
        left_size(left),
        right_size(right) {
    for (Index i = 0; i < mask.rows(); ++i) {
      for (Index j = 0; j < mask.cols(); ++j) {
        if (mask(i, j) == 0.0) continue;
        const double phi = double(T(values(i, j)));
        double e = -phi, size = std::abs(phi);
        for (Index g = 0; g < x.rows(); ++g) {
          e += double(x(g, i)) * double(y(g, j));
          size += std::abs(double(x(g, i)) * double(y(g, j)));
        }
        for (Index g = 0; g < x.rows(); ++g) {
          left(g, i) += e * double(y(g, j));
          right(g, j) += e * double(x(g, i));
          left_size(g, i) += size * std::abs(double(y(g, j)));
          right_size(g, j) += size * std::abs(double(x(g, i)));
        }
        loss += e * e;
        loss_size += size * size;
      }
    }
  }
};

template <class T>
void check_sums(const Matrix<T>& got, const Matrix<double>& wanted, const Matrix<double>& size) {
  bool near = got.rows() == wanted.rows() && got.cols() == wanted.cols();
  for (Index e = 0; near && e < got.size(); ++e) {
    const double off = std::abs(double(got.data()[e]) - wanted.data()[e]);
    near = off <= 8.0 * epsilon<T> * size.data()[e];  // false for NaN; zero tolerance for zero sums
  }
  CHECK(near);
}

template <class T>
void products_of_one_shape(Index m, Index n, Index k, double density, Index gap) {
  const int failures = check::failures;
  const Matrix<double> mask = random_mask(m, n, density);
  const Matrix<double> all = random_matrix<double>(m, n);
  const Observed<T> observed(mask, all);
  check_entries(observed.view());
  const auto x = random_matrix<T>(k, m), y = random_matrix<T>(k, n);
  const Products<T> wanted(mask, all, x, y);
  const Matrix<T> junk_left = Matrix<T>::Constant(k, m, std::numeric_limits<T>::quiet_NaN());
  const Matrix<T> junk_right = Matrix<T>::Constant(k, n, std::numeric_limits<T>::quiet_NaN());
  Strided<T> sx(x, gap), sy(y, gap);
  Matrix<T> first_left, first_right;
  double first_loss = 0.0;
  Workspace workspace;
  for (const int team : teams) {
    for (int outputs = 3; outputs >= 0; --outputs) {  // both outputs, one of them, none
      const bool has_left = outputs / 2 == 1, has_right = outputs % 2 == 1;
      Strided<T> left(junk_left, gap), right(junk_right, gap);
      Context context{team, nullptr};
      if (outputs == 3) context.workspace = &workspace;
      const double loss = residual_products<T>(observed.view(), sx.ref(), sy.ref(),
                                               has_left ? left.ref() : MatrixRef<T>(),
                                               has_right ? right.ref() : MatrixRef<T>(), context);
      CHECK_NEAR(loss, wanted.loss, 8.0 * epsilon<T> * wanted.loss_size);
      CHECK(left.is_intact() && right.is_intact());
      if (has_left) check_sums(left.value(), wanted.left, wanted.left_size);
      if (has_right) check_sums(right.value(), wanted.right, wanted.right_size);
      if (team == 1 && outputs == 3) {
        first_loss = loss;
        first_left = left.value();
        first_right = right.value();
      }
      // Results depend neither on the team nor on the other outputs.
      CHECK(loss == first_loss);
      if (has_left) CHECK(distance(left.value(), first_left) == 0.0);
      if (has_right) CHECK(distance(right.value(), first_right) == 0.0);
    }
  }
  CHECK(distance(sx.value(), x) == 0.0 && distance(sy.value(), y) == 0.0);
  if (check::failures > failures) {
    std::fprintf(stderr, "  %d x %d, k %d, density %g\n", int(m), int(n), int(k), density);
  }
}

template <class T>
void products_match_reference() {
  const std::vector<Index> sizes{0, 1, 2, 3, 5, 7, 8, 13, 17, 31, 64, 97};
  const double densities[] = {0.3, 0.0, 0.07, 1.0, 0.8};
  std::size_t turn = 0;
  for (Index k = 0; k <= 70; ++k) {
    for (std::size_t a = 0; a < sizes.size(); a += 2) {
      const Index m = sizes[(a + turn / 5) % sizes.size()];
      const Index n = sizes[(turn * 7 + a) % sizes.size()];
      products_of_one_shape<T>(m, n, k, densities[turn % 5], turn % 3 == 0 ? 0 : 3);
      ++turn;
    }
  }
  // Many chunks, one row of several chunks, and blocks larger than the caches.
  for (const Index k : {1, 9, 33, 70}) products_of_one_shape<T>(700, 900, k, 0.05, 2);
  products_of_one_shape<T>(3, 20000, 20, 0.6, 0);
  products_of_one_shape<T>(20000, 3, 20, 0.6, 0);
  // A whole chunk of rows without entries.
  products_of_one_shape<T>(20000, 2, 3, 0.0, 0);
}

// A value that is not finite affects its own row and column only.
template <class T>
void nonfinite_values_do_not_spread() {
  for (const Index k : {3, 40}) {
    Matrix<double> mask = Matrix<double>::Zero(6, 30);
    mask.row(2).setOnes();
    mask.row(4).head(9).setOnes();
    const Observed<T> observed(mask, mask);
    auto x = random_matrix<T>(k, 6), y = random_matrix<T>(k, 30);
    x(1, 2) = std::numeric_limits<T>::infinity();
    Matrix<T> left(k, 6), right(k, 30);
    const double loss =
        residual_products<T>(observed.view(), x, y, left, right, Context{1, nullptr});
    CHECK(!std::isfinite(loss));
    CHECK(!left.col(2).allFinite() && left.col(4).allFinite() && left.col(0).allFinite());
    CHECK(!right.col(20).allFinite());
  }
}

template <class T>
void product_sizes_are_checked() {
  const Matrix<double> mask = random_mask(6, 7, 0.5);
  const Observed<T> observed(mask, mask);
  const ObservedEntries<T> entries = observed.view();
  Matrix<T> x(3, 6), y(3, 7), two(2, 7), left(3, 6), right(3, 7);
  const MatrixRef<T> none;
  const Context context{1, nullptr};
  x.setZero();
  y.setZero();
  residual_products<T>(entries, x, y, left, right, context);
  CHECK_THROWS(residual_products<T>(entries, y, y, left, right, context), ShapeError);
  CHECK_THROWS(residual_products<T>(entries, x, x, left, right, context), ShapeError);
  CHECK_THROWS(residual_products<T>(entries, x, two, left, right, context), ShapeError);
  CHECK_THROWS(residual_products<T>(entries, x, y, right, right, context), ShapeError);
  CHECK_THROWS(residual_products<T>(entries, x, y, left, left, context), ShapeError);
  CHECK_THROWS(residual_products<T>(entries, x, y, none, two, context), ShapeError);
  CHECK_THROWS(masked_residual<T>(entries.by_rows, x, right, context), ShapeError);
  Matrix<T> m = Matrix<T>::Zero(6, 7), error(6, 7);
  masked_residual<T>(entries.by_rows, m, error, context);
  CHECK_THROWS(masked_residual<T>(entries.by_rows, m, x, context), ShapeError);
  CHECK_THROWS(masked_residual<T>(entries.by_columns, m, error, context), ShapeError);

  const Matrix<T> b = Matrix<T>::Zero(2, 42), narrow = Matrix<T>::Zero(2, 41);
  const std::vector<T> values(2);
  const auto measured = [&](const Matrix<T>& operators) {
    return Measurements<T>{{operators.data(), operators.rows(), operators.cols()}, values.data()};
  };
  measured_residual<T>(measured(b), m, error, context);
  CHECK_THROWS(measured_residual<T>(measured(narrow), m, error, context), ShapeError);
  CHECK_THROWS(measured_residual<T>(measured(b), m, x, context), ShapeError);
  Strided<T> wide(m, 1);
  CHECK_THROWS(measured_residual<T>(measured(b), wide.ref(), error, context), ShapeError);
  CHECK_THROWS(measured_residual<T>(measured(b), m, wide.ref(), context), ShapeError);
}

template <class T>
void masked_residual_matches_reference() {
  const std::vector<Index> sizes{0, 1, 2, 5, 13, 31, 97};
  std::size_t turn = 0;
  std::vector<std::pair<Index, Index>> shapes{{300, 500}, {2, 9000}, {9000, 2}};
  for (const Index m : sizes) {
    for (const Index n : sizes) shapes.emplace_back(m, n);
  }
  const double densities[] = {0.3, 0.0, 1.0, 0.07};
  for (const auto& [m, n] : shapes) {
    const Matrix<double> mask = random_mask(m, n, densities[turn % 4]);
    const Matrix<double> all = random_matrix<double>(m, n);
    const Observed<T> observed(mask, all);
    const auto w = random_matrix<T>(m, n);
    Matrix<T> wanted = Matrix<T>::Zero(m, n);
    double loss = 0.0;
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < n; ++j) {
        if (mask(i, j) != 0.0) wanted(i, j) = w(i, j) - T(all(i, j));
        loss += double(wanted(i, j)) * double(wanted(i, j));
      }
    }
    const Index gap = turn++ % 2 == 0 ? 3 : 0;
    double first = 0.0;
    for (const int team : teams) {
      Strided<T> from(w, gap);
      Strided<T> error(Matrix<T>::Constant(m, n, std::numeric_limits<T>::quiet_NaN()), gap);
      const double got =
          masked_residual<T>(observed.rows.view(), from.ref(), error.ref(), Context{team, nullptr});
      if (team == 1) first = got;
      CHECK(got == first);
      CHECK_NEAR(got, loss, check::tolerance<double>(m * n) * loss);
      CHECK(distance(error.value(), wanted) == 0.0);
      CHECK(error.is_intact() && from.is_intact() && distance(from.value(), w) == 0.0);
    }
  }
}

template <class T>
void measured_residual_matches_reference() {
  struct Size {
    Index q, m, n;
  };
  // The last ones have several chunks, some of them without measurements.
  const std::vector<Size> sizes{{0, 3, 4},     {1, 3, 4},     {1, 1, 1},    {7, 5, 6},
                                {3, 0, 5},     {40, 13, 17},  {0, 0, 0},    {300, 40, 50},
                                {3, 300, 301}, {9, 150, 170}, {1, 400, 500}};
  for (const auto& [q, m, n] : sizes) {
    const auto w = random_matrix<T>(m, n);
    const auto b = random_matrix<T>(q, m * n);
    const auto values = random_matrix<T>(1, q);
    Matrix<double> wanted = Matrix<double>::Zero(m, n), size = wanted;
    double loss = 0.0, loss_size = 0.0;
    for (Index i = 0; i < q; ++i) {
      double r = -double(values(0, i)), r_size = std::abs(r);
      for (Index e = 0; e < w.size(); ++e) {
        r += double(b(i, e)) * double(w.data()[e]);
        r_size += std::abs(double(b(i, e)) * double(w.data()[e]));
      }
      for (Index e = 0; e < w.size(); ++e) {
        wanted.data()[e] += r * double(b(i, e));
        size.data()[e] += r_size * std::abs(double(b(i, e)));
      }
      loss += r * r;
      loss_size += r_size * r_size;
    }
    for (const Index gap : {0, 3}) {
      Matrix<T> first;
      double first_loss = 0.0;
      Strided<T> operators(b, gap);
      for (const int team : teams) {
        Matrix<T> error = Matrix<T>::Constant(m, n, std::numeric_limits<T>::quiet_NaN());
        const double got =
            measured_residual<T>({operators.ref(), values.data()}, {w.data(), w.rows(), w.cols()},
                                 error, Context{team, nullptr});
        if (team == 1) {
          first = error;
          first_loss = got;
        }
        CHECK(got == first_loss);
        CHECK(distance(error, first) == 0.0);
        check_sums(error, wanted, size);
        CHECK_NEAR(got, loss, 8.0 * epsilon<T> * loss_size);
      }
      CHECK(operators.is_intact());
    }
  }
}

// Entries as (row, column, value) triplets.
template <class T>
struct EntryList {
  std::vector<std::int64_t> row, col;
  std::vector<T> value;

  void add(std::int64_t i, std::int64_t j, double x) {
    row.push_back(i);
    col.push_back(j);
    value.push_back(static_cast<T>(x));
  }
  Index sort(Index rows, Index cols, Order<T>& out) const {
    out.cols = cols;
    out.start.assign(static_cast<std::size_t>(rows) + 1, -1);
    out.index.assign(row.size(), -1);
    out.values.assign(row.size(), T(-1));
    return sort_entries<T>(as_array(row), as_array(col), as_array(value), rows, cols,
                           as_array(out.start), as_array(out.index), as_array(out.values));
  }
};

template <class T>
void sorting_matches_reference() {
  const std::vector<Index> sizes{0, 1, 2, 5, 13, 97};
  for (const Index m : sizes) {
    for (const Index n : sizes) {
      for (const double density : {0.0, 0.2, 1.0}) {
        const Matrix<double> mask = random_mask(m, n, density), all = random_matrix<double>(m, n);
        const Observed<T> wanted(mask, all);
        std::vector<Index> positions;
        for (Index e = 0; e < mask.size(); ++e) {
          if (mask.data()[e] != 0.0) positions.push_back(e);
        }
        std::shuffle(positions.begin(), positions.end(), check::generator());
        EntryList<T> entries;
        for (const Index e : positions) entries.add(e / n, e % n, all.data()[e]);
        Order<T> rows, columns;
        CHECK(entries.sort(m, n, rows) == -1);
        CHECK(rows == wanted.rows);
        columns.cols = m;
        columns.start.assign(static_cast<std::size_t>(n) + 1, -1);
        columns.index.assign(positions.size(), -1);
        columns.values.assign(positions.size(), T(-1));
        transpose_entries<T>(rows.view(), as_array(columns.start), as_array(columns.index),
                             as_array(columns.values));
        CHECK(columns == wanted.columns);
      }
    }
  }
}

// Reports the first invalid entry, for every kind of error.
template <class T>
void sorting_rejects_invalid_entries() {
  const Index m = 9, n = 11;
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  const std::pair<std::int64_t, std::int64_t> outside[] = {
      {-1, 0}, {m, 0}, {0, -1}, {0, n}, {most, 0}, {0, most}, {-most, -most}, {m, n}};
  Order<T> out;
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<Index> positions(m * n);
    std::iota(positions.begin(), positions.end(), 0);
    std::shuffle(positions.begin(), positions.end(), check::generator());
    const Index length = 2 + check::pick(m * n - 2);
    EntryList<T> entries;
    for (Index e = 0; e < length; ++e) entries.add(positions[e] / n, positions[e] % n, 1.0);
    CHECK(entries.sort(m, n, out) == -1);
    Index wanted = -1;
    for (int fault = 0; fault <= trial % 4; ++fault) {
      const Index at = 1 + check::pick(length - 1);
      const Index of = check::pick(2) == 0 ? check::pick(at) : -1;
      if (of >= 0) {
        entries.row[at] = entries.row[of];
        entries.col[at] = entries.col[of];
      } else {
        std::tie(entries.row[at], entries.col[at]) = outside[check::pick(8)];
      }
    }
    std::set<std::pair<std::int64_t, std::int64_t>> seen;
    for (Index e = 0; e < length && wanted < 0; ++e) {
      const auto i = entries.row[e], j = entries.col[e];
      const bool inside = i >= 0 && i < m && j >= 0 && j < n;
      if (!inside || !seen.emplace(i, j).second) wanted = e;
    }
    CHECK(entries.sort(m, n, out) == wanted);
  }
  EntryList<T> empty_list;
  const Index beyond = Index(1) << 31;
  // Arrays of other sizes, in and out.
  std::vector<std::int64_t> three(3), two(2);
  std::vector<std::int32_t> index(3);
  std::vector<T> values(3);
  const auto sort = [&](const auto& row, const auto& col, Index rows, Index size) {
    sort_entries<T>(as_array(row), as_array(col), {values.data(), {3}}, rows, 1, as_array(three),
                    {index.data(), {size}}, as_array(values));
  };
  CHECK_THROWS(sort(three, two, 2, 3), ShapeError);
  CHECK_THROWS(sort(two, two, 2, 3), ShapeError);
  CHECK_THROWS(sort(three, three, 3, 3), ShapeError);
  CHECK_THROWS(sort(three, three, 2, 2), ShapeError);
  for (const auto& [rows, cols] :
       {std::pair<Index, Index>{-1, 1}, {1, -1}, {beyond, 1}, {1, beyond}}) {
    CHECK_THROWS(sort_entries<T>({}, {}, {}, rows, cols, as_array(three), {}, {}), ShapeError);
  }
  CHECK(empty_list.sort(0, 0, out) == -1 && out.start[0] == 0);
  CHECK(empty_list.sort(2, 0, out) == -1 && out.start[2] == 0);
  EntryList<T> single;
  single.add(0, 0, 1.0);
  CHECK(single.sort(0, 0, out) == 0);
  CHECK(single.sort(1, 0, out) == 0);
}

template <class T>
void invalid_entries_are_rejected() {
  Matrix<double> mask(3, 4);
  mask << 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1;
  const Observed<T> good(mask, mask);
  check_entries(good.view());
  const auto check_rejected = [&](const auto& damage) {
    for (const bool of_rows : {true, false}) {
      Observed<T> bad = good;
      ObservedEntries<T> entries = bad.view();
      damage(of_rows ? bad.rows : bad.columns, of_rows ? entries.by_rows : entries.by_columns);
      CHECK_THROWS(check_entries(entries), std::invalid_argument);
      std::vector<std::int64_t> start(10);
      std::vector<std::int32_t> index(10);
      std::vector<T> values(10);
      // Some damage is visible in the other order only.
      try {
        transpose_entries<T>(entries.by_rows, as_array(start), as_array(index), as_array(values));
      } catch (const std::invalid_argument&) {
      }
    }
  };
  using O = Order<T>;
  using S = SparseRows<T>;
  check_rejected([](O& o, S&) { o.start[0] = 1; });
  check_rejected([](O& o, S&) { o.start[0] = -1; });
  check_rejected([](O& o, S&) { o.start.back() += 1; });
  check_rejected([](O& o, S&) { o.start.back() -= 1; });
  check_rejected([](O& o, S&) { o.start[1] = 100; });
  check_rejected([](O& o, S&) { o.start[1] = -3; });
  check_rejected([](O& o, S&) { o.start[2] = o.start[1] - 1; });
  check_rejected([](O& o, S&) { o.start[1] = std::numeric_limits<std::int64_t>::max(); });
  check_rejected([](O& o, S&) { o.start[1] = std::numeric_limits<std::int64_t>::min(); });
  check_rejected([](O& o, S&) { o.index[0] = -1; });
  check_rejected([](O& o, S& s) { o.index[2] = static_cast<std::int32_t>(s.cols); });
  check_rejected([](O& o, S&) { o.index.back() = std::numeric_limits<std::int32_t>::max(); });
  check_rejected([](O& o, S&) { o.index.back() = std::numeric_limits<std::int32_t>::min(); });
  check_rejected([](O&, S& s) { s.size -= 1; });
  check_rejected([](O&, S& s) { s.size = -1; });
  check_rejected([](O&, S& s) { s.rows -= 1; });
  check_rejected([](O&, S& s) { s.rows = -1; });
  check_rejected([](O&, S& s) { s.cols += 1; });
  check_rejected([](O&, S& s) { s.cols -= 1; });
  check_rejected([](O&, S& s) { s.cols = -1; });
  check_rejected([](O&, S& s) { s.start = nullptr; });
  check_rejected([](O&, S& s) { s.index = nullptr; });
  check_rejected([](O&, S& s) { s.values = nullptr; });
  // More entries in one order than in the other.
  ObservedEntries<T> uneven = good.view();
  mask(1, 1) = 1.0;
  const Observed<T> more(mask, mask);
  uneven.by_columns = more.columns.view();
  CHECK_THROWS(check_entries(uneven), ShapeError);
  // More columns than 32-bit indices can address.
  const std::vector<std::int64_t> zeros(2);
  S wide;
  wide.rows = 1;
  wide.cols = Index(1) << 31;
  wide.start = zeros.data();
  std::vector<std::int64_t> start(2);
  CHECK_THROWS(transpose_entries<T>(wide, as_array(start), {}, {}), ShapeError);
  std::swap(wide.rows, wide.cols);
  CHECK_THROWS(transpose_entries<T>(wide, as_array(start), {}, {}), ShapeError);
  // Without room for the columns.
  wide.cols = 2;
  wide.rows = 1;
  CHECK_THROWS(transpose_entries<T>(wide, as_array(start), {}, {}), ShapeError);
  // An empty matrix is valid.
  const Observed<T> empty(Matrix<double>(0, 0), Matrix<double>(0, 0));
  check_entries(empty.view());
}

// A training problem: a full matrix, entries of it, or measurements.
struct Problem {
  Widths widths;
  Matrix<double> target;     // Phi; with a mask only its observed entries count
  Matrix<double> mask;       // empty: no observed entries
  Matrix<double> operators;  // empty: no measurements
  Matrix<double> measured;
  bool measures = false;
  double loss_scale = 0.5, loss_floor = 0.25;
  Rates rates;
  Weights weights;

  Problem(Widths w, bool momentum) : widths(std::move(w)) {
    for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
      const double scale = std::sqrt(3.0 / double(std::max<Index>(1, widths[l])));
      weights.push_back(random_matrix<double>(widths[l + 1], widths[l], 0.9 * scale));
      rates.learning_rate.push_back(0.02 + 0.01 * double(l));
      rates.weight_decay.push_back(l == 1 ? 0.0 : 0.05);
      rates.momentum.push_back(momentum && l != 1 ? 0.6 + 0.1 * double(l % 3) : 0.0);
    }
    target = random_matrix<double>(d_out(), d_in());
  }
  void observe(double density) { mask = random_mask(d_out(), d_in(), density); }
  void measure(Index q) {
    measures = true;
    // With norm near 1, gradient descent is stable for these rates.
    const double scale = 1.0 / std::sqrt(double(q + d_out() * d_in()));
    operators = random_matrix<double>(q, d_out() * d_in(), scale);
    measured = random_matrix<double>(1, q);
  }

  Index n_layers() const { return static_cast<Index>(weights.size()); }
  Index d_in() const { return widths.front(); }
  Index d_out() const { return widths.back(); }
};

// Reference implementation by the definition.
struct Naive {
  const Problem& problem;
  Weights weights, velocity;

  explicit Naive(const Problem& p) : problem(p), weights(p.weights) {
    for (const auto& w : weights) velocity.push_back(Matrix<double>::Zero(w.rows(), w.cols()));
  }

  // Returns W_{to:from}, layers from 1; the identity if from > to.
  Matrix<double> chain(Index to, Index from) const {
    Matrix<double> m = Matrix<double>::Identity(problem.widths[from - 1], problem.widths[from - 1]);
    for (Index l = from; l <= to; ++l) m = (weights[l - 1] * m).eval();
    return m;
  }
  // Returns the gradient of `squares` / 2 with respect to W_{L:1}.
  Matrix<double> error(double* squares = nullptr) const {
    const Matrix<double> m = chain(problem.n_layers(), 1);
    Matrix<double> e = m - problem.target;
    if (problem.measures) {
      Matrix<double> vec = m;
      vec.resize(m.size(), 1);
      const Matrix<double> r = problem.operators * vec - problem.measured.transpose();
      e = problem.operators.transpose() * r;
      e.resize(problem.d_out(), problem.d_in());
      if (squares != nullptr) *squares = r.squaredNorm();
      return e;
    }
    if (problem.mask.size() > 0) e = e.cwiseProduct(problem.mask).eval();
    if (squares != nullptr) *squares = e.squaredNorm();
    return e;
  }
  double loss() const {
    double squares = 0.0;
    error(&squares);
    return 0.5 * problem.loss_scale * squares + problem.loss_floor;
  }
  void step(double factor = 1.0) {
    Weights g;
    const Matrix<double> e = error();
    for (Index l = 1; l <= problem.n_layers(); ++l) {
      g.push_back(problem.loss_scale * chain(problem.n_layers(), l + 1).transpose() * e *
                  chain(l - 1, 1).transpose());
    }
    for (std::size_t l = 0; l < g.size(); ++l) {
      velocity[l] = problem.rates.momentum[l] * velocity[l] + g[l] +
                    problem.rates.weight_decay[l] * weights[l];
      weights[l] -= factor * problem.rates.learning_rate[l] * velocity[l];
    }
  }
};

// The same problem in precision T, with its stepper.
template <class T>
struct Fast {
  Matrix<T> target, operators, measured;
  Observed<T> observed;
  ObservedEntries<T> entries;
  Measurements<T> measurements;
  std::vector<Matrix<T>> weights;
  Objective<T> objective;
  std::unique_ptr<DenseDescent<T>> descent;

  Fast(const Problem& p, int n_threads)
      : target(p.target.template cast<T>()),
        operators(p.operators.template cast<T>()),
        measured(p.measured.template cast<T>()),
        observed(p.mask, p.target) {
    std::vector<MatrixRef<T>> refs;
    for (const auto& w : p.weights) weights.push_back(w.template cast<T>());
    for (auto& w : weights) refs.emplace_back(w);
    objective.loss_scale = p.loss_scale;
    objective.loss_floor = p.loss_floor;
    if (p.measures) {
      measurements = {operators, measured.data()};
      objective.measurements = measurements;
    } else if (p.mask.size() > 0 || p.target.size() == 0) {
      // An empty matrix has an empty mask, from which its sizes cannot be read.
      observed = Observed<T>(Matrix<double>(p.mask.size() > 0 ? p.mask : p.target), p.target);
      entries = observed.view();
      objective.observed = entries;
    } else {
      objective.target = target;
    }
    descent =
        std::make_unique<DenseDescent<T>>(refs, objective, p.rates, Context{n_threads, nullptr});
  }
};

const std::vector<Widths> networks{
    {5, 4},  // one layer
    {4, 1},
    {12, 12, 12, 12},  // square
    {20, 3, 3, 20},    // a narrow network
    {9, 8, 7, 2},      // thin output
    {2, 7, 8, 9},      // thin input
    {8, 3, 9},         // hourglass
    {12, 3, 8, 9, 10},
    {12, 9, 8, 3, 10},
    {3, 9, 4},  // bulge
    {1, 1, 1},
    {1, 9, 9, 1},
    {40, 41, 5, 42, 43},
    {66, 66, 66, 66},  // too wide for the thin kernels
    {90, 66, 70, 90},
    {3, 0, 2},  // nothing flows through an empty layer
    {0, 3, 2},
    {3, 2, 0},
};

std::string name(const Widths& widths) {
  std::string text;
  for (const Index d : widths) text += " " + std::to_string(d);
  return text;
}

template <class T>
void same_iterates(const Problem& problem, int steps) {
  const int failures = check::failures;
  const Index widest = *std::max_element(problem.widths.begin(), problem.widths.end());
  // Rates and norms keep the growth of an error per step near 1; 4 covers it.
  const double allowed = check::tolerance<T>(widest, 4.0 * steps);
  Fast<T> first(problem, 1);
  for (const int team : teams) {
    Naive naive(problem);
    Fast<T> fast(problem, team);
    for (int t = 0; t <= steps; ++t) {
      const double loss = naive.loss();
      CHECK_NEAR(fast.descent->evaluate(), loss, allowed * (1.0 + std::abs(loss)));
      for (std::size_t l = 0; l < fast.weights.size(); ++l) {
        CHECK_NEAR(distance(fast.weights[l], naive.weights[l]), 0.0, allowed);
      }
      fast.descent->update();
      naive.step();
      if (team == 1) {
        first.descent->evaluate();
        first.descent->update();
      }
    }
    for (std::size_t l = 0; l < fast.weights.size(); ++l) {
      CHECK(fast.weights[l] == first.weights[l]);
      if (problem.rates.learning_rate[l] == 0.0) {  // not touched, not even rounded
        CHECK(fast.weights[l] == problem.weights[l].template cast<T>());
      }
    }
  }
  if (check::failures > failures) {
    std::fprintf(stderr, "  widths%s, frozen", name(problem.widths).c_str());
    for (const double r : problem.rates.learning_rate) std::fprintf(stderr, " %d", int(r == 0.0));
    std::fprintf(stderr, "%s\n", problem.measures ? ", measured" : "");
  }
}

// Sets of frozen layers: none, each alone, all but each, and all.
std::vector<std::vector<bool>> frozen_sets(std::size_t n) {
  std::vector<std::vector<bool>> sets{std::vector<bool>(n, false)};
  for (std::size_t l = 0; l < n; ++l) {
    for (const bool alone : {true, false}) {
      std::vector<bool> frozen(n, !alone);
      frozen[l] = alone;
      sets.push_back(frozen);
    }
  }
  sets.emplace_back(n, true);
  return sets;
}

std::string kind_of(const Problem& problem) {
  const double size = double(problem.d_out()) * double(problem.d_in());
  double ends = size;
  if (problem.mask.size() > 0) ends = std::min(ends, 4.0 * problem.mask.sum());
  const Index pivot = best_pivot(problem.widths, ends);
  const bool inside = pivot > 0 && pivot < problem.n_layers();
  return std::string(inside && ends < size ? "sparse" : "dense") +
         (problem.widths[pivot] <= thin_limit ? ", thin, " : ", wide, ") +
         (inside       ? "inside"
          : pivot == 0 ? "input"
                       : "output");
}

template <class T>
void networks_with_observed_entries() {
  std::set<std::string> kinds;
  int turn = 0;
  for (const Widths& widths : networks) {
    const int steps = *std::max_element(widths.begin(), widths.end()) > 60 ? 3 : 8;
    for (const double density : {0.1, 0.0, 0.9, 1.0}) {
      for (const auto& frozen : frozen_sets(widths.size() - 1)) {
        Problem problem(widths, turn++ % 2 == 0);
        problem.observe(density);
        if (turn % 3 == 0) problem.rates.weight_decay.assign(problem.weights.size(), 0.0);
        for (std::size_t l = 0; l < frozen.size(); ++l) {
          if (frozen[l]) problem.rates.learning_rate[l] = 0.0;
        }
        kinds.insert(kind_of(problem));
        same_iterates<T>(problem, steps);
      }
    }
  }
  // Every code path of a step with observed entries is covered.
  for (const char* kind : {"sparse, thin, inside", "sparse, wide, inside", "dense, thin, inside",
                           "dense, thin, input", "dense, thin, output", "dense, wide, output"}) {
    CHECK(kinds.count(kind) == 1);
    if (kinds.count(kind) != 1) std::fprintf(stderr, "  %s\n", kind);
  }
}

template <class T>
void networks_with_measurements() {
  int turn = 0;
  for (const Widths& widths : networks) {
    if (*std::max_element(widths.begin(), widths.end()) > 60) continue;
    for (const Index q : {9, 0, 1, 70}) {
      for (const auto& frozen : frozen_sets(widths.size() - 1)) {
        Problem problem(widths, turn++ % 2 == 0);
        problem.measure(q);
        for (std::size_t l = 0; l < frozen.size(); ++l) {
          if (frozen[l]) problem.rates.learning_rate[l] = 0.0;
        }
        same_iterates<T>(problem, 6);
      }
    }
  }
}

// Frozen layers with the full target, small networks included.
template <class T>
void networks_with_frozen_layers() {
  int turn = 0;
  for (const Widths& widths : networks) {
    if (std::find(widths.begin(), widths.end(), 0) != widths.end()) continue;
    for (const auto& frozen : frozen_sets(widths.size() - 1)) {
      Problem problem(widths, turn++ % 2 == 0);
      for (std::size_t l = 0; l < frozen.size(); ++l) {
        if (frozen[l]) problem.rates.learning_rate[l] = 0.0;
      }
      Naive naive(problem);
      Fast<T> fast(problem, 1);
      const double allowed = check::tolerance<T>(90, 20.0);
      for (int t = 0; t < 5; ++t) {
        CHECK_NEAR(fast.descent->evaluate(), naive.loss(), allowed * (1.0 + naive.loss()));
        fast.descent->update();
        naive.step();
      }
      fast.descent->weights();
      for (std::size_t l = 0; l < fast.weights.size(); ++l) {
        CHECK_NEAR(distance(fast.weights[l], naive.weights[l]), 0.0, allowed);
        if (frozen[l]) CHECK(fast.weights[l] == problem.weights[l].template cast<T>());
      }
    }
  }
}

template <class T>
void results_do_not_depend_on_team() {
  for (const Widths& widths : {Widths{300, 300, 300}, {600, 8, 8, 500}, {200, 70, 200}}) {
    for (const double density : {0.02, 0.5}) {
      Problem problem(widths, true);
      problem.observe(density);
      Fast<T> one(problem, 1);
      double loss = 0.0;
      for (int t = 0; t < 3; ++t) {
        loss = one.descent->evaluate();
        one.descent->update();
      }
      for (const int team : {0, 2, 3, 7}) {
        Fast<T> many(problem, team);
        double same = 0.0;
        for (int t = 0; t < 3; ++t) {
          same = many.descent->evaluate();
          many.descent->update();
        }
        CHECK(same == loss);
        for (std::size_t l = 0; l < one.weights.size(); ++l) {
          CHECK(one.weights[l] == many.weights[l]);
        }
      }
    }
  }
}

// Returns a matrix with known singular values: `largest`, then at most half of it.
Matrix<double> spectral_matrix(Index rows, Index cols, double largest) {
  const Index k = std::min(rows, cols);
  Matrix<double> scaled = check::random_orthonormal(rows, k);
  for (Index i = 0; i < k; ++i) scaled.col(i) *= i == 0 ? largest : largest * std::pow(0.5, i);
  return scaled * check::random_orthonormal(k, cols);
}

// The formula of descent.hpp, term by term.
double rate_of(const Problem& p, const std::vector<double>& s, double loss) {
  const AdaptiveRate& adaptive = p.rates.adaptive;
  const double c = p.loss_scale;
  const double e = adaptive.error_scale * std::sqrt(2.0 * (loss - p.loss_floor) / c);
  const std::size_t n = s.size();
  double gauss_newton = 0.0, residual = 0.0, lambda = 0.0, momentum = 0.0;
  for (std::size_t l = 0; l < n; ++l) {
    const double m = p.rates.learning_rate[l];
    double product = 1.0, row = 0.0;
    for (std::size_t j = 0; j < n; ++j) product *= j == l ? 1.0 : s[j];
    gauss_newton += m * adaptive.curvature[l] * product * product;
    for (std::size_t k = 0; k < n; ++k) {
      if (k == l) continue;
      double pair = 1.0;
      for (std::size_t j = 0; j < n; ++j) pair *= j == l || j == k ? 1.0 : s[j];
      row += std::sqrt(m * p.rates.learning_rate[k]) * pair * e;
    }
    residual = std::max(residual, row);
    lambda = std::max(lambda, m * p.rates.weight_decay[l]);
    momentum = std::max(momentum, p.rates.momentum[l]);
  }
  return (1.0 - momentum) * adaptive.safety / (c * gauss_newton + c * residual + lambda);
}

template <class T>
void adaptive_rates_match_formula() {
  int turn = 0;
  for (const Widths& widths : networks) {
    if (*std::min_element(widths.begin(), widths.end()) == 0) continue;
    for (int variant = 0; variant < 6; ++variant) {
      Problem problem(widths, variant % 2 == 1);
      if (variant % 3 == 1) problem.observe(variant == 1 ? 0.1 : 0.9);
      if (variant % 3 == 2) problem.measure(5);
      std::vector<double> s;
      for (Index l = 0; l < problem.n_layers(); ++l) {
        s.push_back(0.7 + 0.2 * double((l + turn) % 4));
        problem.weights[l] = spectral_matrix(widths[l + 1], widths[l], s.back());
        problem.rates.adaptive.curvature.push_back(l % 2 == 0 ? 1.0 : 0.6);
      }
      ++turn;
      problem.rates.adaptive.safety = 0.9;
      problem.rates.adaptive.error_scale = 1.3;
      if (turn % 4 == 0 && s.size() > 1) problem.rates.learning_rate[0] = 0.0;
      Naive naive(problem);
      Fast<T> fast(problem, 1);
      // Evaluations do not change the weights. Each of them shrinks the components along the other
      // singular vectors by 2^4, and they enter the value squared.
      for (int evaluation = 0; evaluation < 15; ++evaluation) fast.descent->evaluate();
      const double wanted = rate_of(problem, s, naive.loss());
      // Each of the few factors is a norm over a row, or its square.
      const double allowed = check::tolerance<T>(90, 2.0 * double(s.size()));
      CHECK_NEAR(fast.descent->rate() / wanted, 1.0, allowed);
      fast.descent->update();
      naive.step(wanted);
      for (std::size_t l = 0; l < s.size(); ++l) {
        CHECK_NEAR(distance(fast.weights[l], naive.weights[l]), 0.0, 4.0 * allowed);
      }
    }
  }
  // For layers of rank 1, a single evaluation gives the exact singular values.
  Problem problem({9, 7, 6, 8}, false);
  for (Index l = 0; l < 3; ++l) {
    problem.weights[l] = random_matrix<double>(problem.widths[l + 1], 1) *
                         random_matrix<double>(1, problem.widths[l]);
  }
  std::vector<double> s;
  for (const auto& w : problem.weights) s.push_back(w.norm());
  problem.observe(0.5);
  problem.rates.adaptive = {1.5, {1.0, 1.0, 1.0}, 1.0};
  Fast<T> fast(problem, 2);
  const double loss = fast.descent->evaluate();
  CHECK_NEAR(fast.descent->rate() / rate_of(problem, s, loss), 1.0, check::tolerance<T>(10, 6.0));
}

// Safety 1 is half of the stability limit: the loss never rises, and descent makes progress.
void adaptive_rates_never_raise_the_loss() {
  for (const bool measures : {false, true}) {
    for (const Widths& widths : {Widths{20, 20, 20}, {20, 3, 3, 20}, {15, 20, 20, 12}, {6, 5}}) {
      Problem problem(widths, false);
      if (measures) {
        problem.measure(30);
      } else {
        problem.observe(0.3);
      }
      problem.rates.weight_decay.assign(problem.weights.size(), 0.0);
      // The norm of B bounds the curvature of the measurements and their gradient.
      const double norm = measures ? problem.operators.norm() : 1.0;
      problem.rates.adaptive = {1.0, std::vector<double>(problem.weights.size(), norm * norm),
                                norm};
      Fast<double> fast(problem, 1);
      const double first = fast.descent->evaluate() - problem.loss_floor;
      double before = first;
      for (int t = 0; t < 400; ++t) {
        const double rate = fast.descent->rate();
        CHECK(std::isfinite(rate) && rate > 0.0);
        fast.descent->update();
        const double now = fast.descent->evaluate() - problem.loss_floor;
        CHECK(now <= before + 1e-14);
        before = now;
      }
      CHECK(before < 0.5 * first);
    }
  }
}

void zero_sharpness_gives_rate_zero() {
  Problem problem({4, 4, 4, 4}, true);
  for (auto& w : problem.weights) w.setZero();
  problem.rates.weight_decay.assign(3, 0.0);
  problem.observe(0.5);
  problem.rates.adaptive = {1.0, {1.0, 1.0, 1.0}, 1.0};
  Fast<double> fast(problem, 1);
  for (int t = 0; t < 3; ++t) {
    CHECK(std::isfinite(fast.descent->evaluate()));
    CHECK(fast.descent->rate() == 0.0);
    fast.descent->update();
  }
  for (const auto& w : fast.weights) CHECK(w.cwiseAbs().maxCoeff() == 0.0);
  problem.rates.adaptive = {};
  Fast<double> constant(problem, 1);
  constant.descent->evaluate();
  CHECK(constant.descent->rate() == 1.0);
}

void descent_checks_its_observations() {
  Problem problem({3, 4, 2}, false);
  problem.observe(1.0);
  const auto build = [&](const Objective<double>& objective, const Rates& rates) {
    Weights w = problem.weights;
    std::vector<MatrixRef<double>> refs;
    for (auto& each : w) refs.emplace_back(each);
    DenseDescent<double>(refs, objective, rates, Context{1, nullptr});
  };
  const Fast<double> good(problem, 1);
  build(good.objective, problem.rates);
  const auto observe = [](const Matrix<double>& mask) { return Observed<double>(mask, mask); };
  Objective<double> o = good.objective;
  for (const auto& [m, n] : {std::pair<Index, Index>{2, 4}, {3, 3}, {3, 2}, {0, 0}}) {
    const Observed<double> other = observe(Matrix<double>::Ones(m, n));
    const ObservedEntries<double> entries = other.view();
    o.observed = entries;
    CHECK_THROWS(build(o, problem.rates), ShapeError);
  }
  ObservedEntries<double> damaged = good.entries;
  damaged.by_columns.index = good.observed.rows.index.data();  // 3 columns, but only 2 rows
  o.observed = damaged;
  CHECK_THROWS(build(o, problem.rates), std::invalid_argument);

  Matrix<double> b = Matrix<double>::Ones(2, 6), narrow = Matrix<double>::Ones(2, 5);
  const double values[] = {1.0, 2.0};
  Measurements<double> measured{b, values};
  o = good.objective;
  o.measurements = measured;
  CHECK_THROWS(build(o, problem.rates), ShapeError);  // both kinds of observations
  o.observed.reset();
  build(o, problem.rates);
  o.measurements->operators = narrow;
  CHECK_THROWS(build(o, problem.rates), ShapeError);
  o.measurements->operators = b;
  Matrix<double> factor = Matrix<double>::Identity(3, 3);
  o.input_gram = factor;
  CHECK_THROWS(build(o, problem.rates), ShapeError);
  o.measurements.reset();
  o.observed = good.objective.observed;
  CHECK_THROWS(build(o, problem.rates), ShapeError);

  Rates rates = problem.rates;
  rates.adaptive.safety = 1.0;
  CHECK_THROWS(build(good.objective, rates), ShapeError);
  rates.adaptive.curvature.assign(3, 1.0);
  CHECK_THROWS(build(good.objective, rates), ShapeError);
  rates.adaptive.curvature.assign(2, 1.0);
  build(good.objective, rates);
}

template <class T>
void both_precisions() {
  products_match_reference<T>();
  nonfinite_values_do_not_spread<T>();
  product_sizes_are_checked<T>();
  masked_residual_matches_reference<T>();
  measured_residual_matches_reference<T>();
  sorting_matches_reference<T>();
  sorting_rejects_invalid_entries<T>();
  invalid_entries_are_rejected<T>();
  networks_with_observed_entries<T>();
  networks_with_measurements<T>();
  networks_with_frozen_layers<T>();
  results_do_not_depend_on_team<T>();
  adaptive_rates_match_formula<T>();
}

}  // namespace

int main() {
  both_precisions<double>();
  both_precisions<float>();
  adaptive_rates_never_raise_the_loss();
  zero_sharpness_gives_rate_zero();
  descent_checks_its_observations();
  return check::result();
}
