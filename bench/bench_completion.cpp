// SPDX-License-Identifier: MIT
// The products with the residual of a matrix of which some entries are observed, random ones
// (dlnfast/completion.hpp):
//   bench_completion [--rows 1000,100,610,100000] [--cols 1000,100,9724,100000]
//                    [--entries 200000,3000,100000,10000000] [--k 10,10,20,20]
// one case for each position in the lists, and the options of harness.hpp. Flops are 8 k per entry.
// Bytes are those of the entries in both orders, and of both factors and both products, once each.
// Repeated loads of the columns of the factors are assumed to hit the caches.
#include "dlnfast/completion.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "dlnfast/workspace.hpp"
#include "harness.hpp"

using namespace dlnfast;

namespace {

template <class T>
struct Order {
  std::vector<std::int64_t> start;
  std::vector<std::int32_t> index;
  std::vector<T> values;

  Order(Index rows, Index n) : start(rows + 1), index(n), values(n) {}
  SparseRows<T> view(Index cols) const {
    return {static_cast<Index>(start.size()) - 1,
            cols,
            static_cast<Index>(index.size()),
            start.data(),
            index.data(),
            values.data()};
  }
};

// n different indices of entries of an m x d matrix, row-major and sorted.
std::vector<Index> random_indices(Index m, Index d, Index n) {
  std::vector<Index> indices;
  while (static_cast<Index>(indices.size()) < n) {
    for (Index more = n - static_cast<Index>(indices.size()); more > 0; --more) {
      indices.push_back(check::pick(m * d));
    }
    std::sort(indices.begin(), indices.end());
    indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
  }
  return indices;
}

// Compares some columns of a product with plain sums.
template <class T>
void check_product(const Matrix<T>& got, const Matrix<T>& fixed, const Matrix<T>& moving,
                   const SparseRows<T>& entries) {
  const Index k = got.rows();
  Matrix<double> wanted = Matrix<double>::Zero(k, 20), found(k, 20);
  for (Index s = 0; s < wanted.cols(); ++s) {
    const Index i = check::pick(entries.rows);
    found.col(s) = got.col(i).template cast<double>();
    for (Index at = entries.start[i]; at < entries.start[i + 1]; ++at) {
      const auto piece = moving.col(entries.index[at]).template cast<double>();
      const double e = fixed.col(i).template cast<double>().dot(piece) - double(entries.values[at]);
      wanted.col(s) += e * piece;
    }
  }
  const double terms = double(entries.size) / double(entries.rows) + double(k);
  CHECK_NEAR((found - wanted).norm(), 0.0,
             4.0 * check::tolerance<T>(static_cast<Index>(terms)) * wanted.norm());
}

template <class T>
void measure(bench::Harness& harness, Index m, Index d, Index n, Index k) {
  if (n > m * d) bench::refuse("--entries is larger than the number of entries of the matrix");
  std::vector<std::int64_t> row, col;
  std::vector<T> value;
  for (const Index index : random_indices(m, d, n)) {
    row.push_back(index / d);
    col.push_back(index % d);
    value.push_back(static_cast<T>(check::uniform()));
  }
  Order<T> rows(m, n), columns(d, n);
  const Index bad =
      sort_entries<T>(as_array(row), as_array(col), as_array(value), m, d, as_array(rows.start),
                      as_array(rows.index), as_array(rows.values));
  CHECK(bad == -1);
  transpose_entries<T>(rows.view(d), as_array(columns.start), as_array(columns.index),
                       as_array(columns.values));
  const ObservedEntries<T> entries{rows.view(d), columns.view(m)};
  check_entries(entries);

  auto x = check::random_matrix<T>(k, m), y = check::random_matrix<T>(k, d);
  Matrix<T> left(k, m), right(k, d);
  Workspace workspace;
  Context context;
  context.n_threads = harness.threads();
  context.workspace = &workspace;
  const double flops = 8.0 * double(k) * double(n);
  const double bytes =
      2.0 * double(n) * (4.0 + sizeof(T)) + 2.0 * double(k) * double(m + d) * sizeof(T);
  const std::vector<bench::Peer> peers{{"residual_products", flops, bytes, [&] {
                                          residual_products<T>(entries, x, y, left, right, context);
                                        }}};
  peers[0].job();
  check_product(left, x, y, entries.by_rows);
  check_product(right, y, x, entries.by_columns);
  harness.run<T>({{"m", m}, {"n", d}, {"entries", n}, {"k", k}}, peers);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(argc, argv);
  const auto rows = options.list("--rows", {1000, 100, 610, 100000});
  const auto cols = options.list("--cols", {1000, 100, 9724, 100000});
  const auto entries = options.list("--entries", {200000, 3000, 100000, 10000000});
  const auto ranks = options.list("--k", {10, 10, 20, 20});
  bench::Harness harness("completion", options);
  if (cols.size() != rows.size() || entries.size() != rows.size() || ranks.size() != rows.size()) {
    bench::refuse("the lists of --rows, --cols, --entries and --k have different lengths");
  }
  return harness.each_precision([&](auto zero) {
    for (std::size_t c = 0; c < rows.size(); ++c) {
      measure<decltype(zero)>(harness, rows[c], cols[c], entries[c], ranks[c]);
    }
  });
}
