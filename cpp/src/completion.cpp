// SPDX-License-Identifier: MIT
#include "dlnfast/completion.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/sparse_rows.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

// The k entries of a column of X or Y are copied to contiguous memory, padded with zeros to whole
// vectors; such a copy is called a piece. A matrix entry then takes one inner product of two pieces
// and, once its residual is known, adds one multiple of a piece to a sum. Entries are processed
// `lanes` at a time: a tree of shuffles sums their inner products together, and ends with one of
// them in each lane.
//
// Rows (and columns) are split into chunks with about equally many entries. The chunks depend on
// the entries alone, and losses are summed chunk by chunk, so results do not depend on the number
// of threads.
namespace dlnfast {
namespace {

constexpr double flops_per_thread = 4e5;
constexpr Index pieces_per_chunk = 256;

template <class T>
using Vector = typename simd::Pack<T>::Vector;

template <class T>
constexpr int lanes = simd::Pack<T>::size;

// Number of vectors of one piece.
template <class T>
Index vectors_of(Index k) {
  return (k + lanes<T> - 1) / lanes<T>;
}

// Prefetch distance, in entries, if the pieces exceed the second-level cache.
constexpr Index entries_ahead = 32;
constexpr Index cache_bytes = 512 * 1024;

// Copies columns begin .. end - 1 of `block` (k x n) to pieces.
template <class T>
void gather_pieces(const MatrixRef<const T>& block, Index begin, Index end, T* pieces) {
  const Index stride = vectors_of<T>(block.rows) * lanes<T>;
  for (Index j = begin; j < end; ++j) {
    T* piece = pieces + j * stride;
    for (Index g = 0; g < block.rows; ++g) piece[g] = block.row(g)[j];
    std::fill(piece + block.rows, piece + stride, T(0));
  }
}

// One direction of the products: for every row i of `entries`, the residuals e_ij = fixed_i .
// moving_j - Phi_ij and the sum of e_ij moving_j.
template <class T>
struct Pass {
  const SparseRows<T>* entries;
  const T* fixed;     // one piece per row
  const T* moving;    // one piece per column
  MatrixRef<T> sums;  // k x rows; absent: compute only the loss
  bool is_zero;       // whether all inner products are 0: E = -Omega * Phi
};

template <class T>
bool all_zero(const MatrixRef<const T>& block) {
  for (Index g = 0; g < block.rows; ++g) {
    for (Index j = 0; j < block.cols; ++j) {
      if (block.row(g)[j] != T(0)) return false;
    }
  }
  return true;
}

// Largest number of vectors of a row's sum that is held in registers; longer sums are in memory.
constexpr Index max_register_vectors = 4;

// Returns fixed . pieces[g] for `lanes` entries. n_vectors = 0: the number is `vectors`.
template <class T, int n_vectors>
DLNFAST_INLINE inline Vector<T> inner_products(const T* fixed, const T* const* pieces,
                                               Index vectors) {
  using P = simd::Pack<T>;
  Vector<T> dots[P::size] = {};
  const auto add = [&](Index v) DLNFAST_INLINE {
    Vector<T> x = P::load(fixed + v * P::size);
    simd::hold_in_register(x);
    simd::unroll<P::size>([&](auto g)
                              DLNFAST_INLINE { dots[g] += x * P::load(pieces[g] + v * P::size); });
  };
  if constexpr (n_vectors > 0) {
    simd::unroll<n_vectors>([&](auto v) DLNFAST_INLINE { add(v); });
  } else {
    for (Index v = 0; v < vectors; ++v) add(v);
  }
  return simd::sums<P>(dots);
}

// Prefetches the pieces of the entries from `at` on.
template <class T>
void prefetch_pieces(const SparseRows<T>& entries, const T* moving, Index stride, Index at,
                     Index end) {
  for (Index e = at; e < std::min<Index>(at + lanes<T>, end); ++e) {
    const char* piece = reinterpret_cast<const char*>(moving + entries.index[e] * stride);
    for (Index b = 0; b < stride * static_cast<Index>(sizeof(T)); b += 64) {
      __builtin_prefetch(piece + b, 0, 3);
    }
  }
}

template <class T, int n_vectors>
double run_rows(const Pass<T>& pass, Index begin, Index end, Index k, T* sum_buffer) {
  using P = simd::Pack<T>;
  const SparseRows<T>& entries = *pass.entries;
  const Index vectors = n_vectors > 0 ? n_vectors : vectors_of<T>(k);
  const Index stride = vectors * P::size;
  const bool sums = !pass.sums.absent();
  const auto inner = [&](const T* fixed, const T* const* pieces) DLNFAST_INLINE {
    return pass.is_zero ? Vector<T>{} : inner_products<T, n_vectors>(fixed, pieces, vectors);
  };
  const bool is_out_of_cache = entries.cols * stride * static_cast<Index>(sizeof(T)) > cache_bytes;
  const Index last = entries.start[end];
  constexpr int n_sums = n_vectors > 0 ? n_vectors : 1;
  Vector<T> squares = {};
  for (Index i = begin; i < end; ++i) {
    const T* fixed = pass.fixed + i * stride;
    Vector<T> sum[n_sums] = {};
    if (n_vectors == 0) std::fill(sum_buffer, sum_buffer + stride, T(0));
    const auto add = [&](const T* const* pieces, const Vector<T>& e) DLNFAST_INLINE {
      squares += e * e;
      if (!sums) return;
      T error[P::size];
      P::store(error, e);
      // Two new sums for every group: a single running sum would wait for its own latency.
      const auto weighted = [&](Index v) DLNFAST_INLINE {
        Vector<T> even = {}, odd = {};
        simd::unroll<P::size / 2>([&](auto g) DLNFAST_INLINE {
          even += P::load(pieces[2 * g] + v * P::size) * error[2 * g];
          odd += P::load(pieces[2 * g + 1] + v * P::size) * error[2 * g + 1];
        });
        return even + odd;
      };
      if constexpr (n_vectors > 0) {
        simd::unroll<n_vectors>([&](auto v) DLNFAST_INLINE { sum[v] += weighted(v); });
      } else {
        for (Index v = 0; v < vectors; ++v) {
          T* to = sum_buffer + v * P::size;
          P::store(to, P::load(to) + weighted(v));
        }
      }
    };
    const Index stop = entries.start[i + 1];
    Index at = entries.start[i];
    const T* pieces[P::size];
    for (; at + P::size <= stop; at += P::size) {
      if (is_out_of_cache) prefetch_pieces(entries, pass.moving, stride, at + entries_ahead, last);
      const std::int32_t* index = entries.index + at;
      simd::unroll<P::size>([&](auto g)
                                DLNFAST_INLINE { pieces[g] = pass.moving + index[g] * stride; });
      add(pieces, inner(fixed, pieces) - P::load(entries.values + at));
    }
    if (const int n = static_cast<int>(stop - at); n > 0) {
      if (is_out_of_cache) prefetch_pieces(entries, pass.moving, stride, at + entries_ahead, last);
      // The remaining lanes repeat the first entry; their results are set to zero.
      const std::int32_t* index = entries.index + at;
      simd::unroll<P::size>(
          [&](auto g) DLNFAST_INLINE { pieces[g] = pass.moving + index[g < n ? g : 0] * stride; });
      const Vector<T> known = P::load_part(entries.values + at, n);
      add(pieces, P::first(inner(fixed, pieces) - known, n));
    }
    if (!sums) continue;
    T piece[n_sums * P::size];
    if constexpr (n_vectors > 0) {
      simd::unroll<n_vectors>([&](auto v)
                                  DLNFAST_INLINE { P::store(piece + v * P::size, sum[v]); });
    }
    const T* from = n_vectors > 0 ? piece : sum_buffer;
    for (Index g = 0; g < k; ++g) pass.sums.row(g)[i] = from[g];
  }
  return static_cast<double>(P::sum(squares));
}

// `sum_buffer` holds one piece, if it is longer than max_register_vectors.
template <class T>
double run_rows(const Pass<T>& pass, Index begin, Index end, Index k, T* sum_buffer) {
  static_assert(max_register_vectors == 4);
  switch (vectors_of<T>(k)) {
    case 1: return run_rows<T, 1>(pass, begin, end, k, sum_buffer);
    case 2: return run_rows<T, 2>(pass, begin, end, k, sum_buffer);
    case 3: return run_rows<T, 3>(pass, begin, end, k, sum_buffer);
    case 4: return run_rows<T, 4>(pass, begin, end, k, sum_buffer);
    default: return run_rows<T, 0>(pass, begin, end, k, sum_buffer);
  }
}

}  // namespace

template <class T>
void check_rows(const SparseRows<T>& e, const char* name) {
  const std::string what(name);
  if (e.rows < 0 || e.cols < 0 || e.size < 0) throw ShapeError(what + " have a negative size");
  if (std::max(e.rows, e.cols) > std::numeric_limits<std::int32_t>::max()) {
    throw ShapeError(what + " have more rows or columns than 32-bit indices allow");
  }
  if (e.start == nullptr) throw ShapeError(what + " have no starts");
  if (e.size > 0 && (e.index == nullptr || e.values == nullptr)) {
    throw ShapeError(what + " have no indices or no values");
  }
  bool ascending = e.start[0] == 0 && e.start[e.rows] == e.size;
  for (Index i = 0; i < e.rows; ++i) ascending = ascending && e.start[i] <= e.start[i + 1];
  if (!ascending) {
    throw std::invalid_argument(what +
                                " have starts that do not ascend from 0 to the number of entries");
  }
  for (Index at = 0; at < e.size; ++at) {
    if (e.index[at] < 0 || e.index[at] >= e.cols) {
      throw std::invalid_argument(what + " have an index outside the matrix");
    }
  }
}

template <class T>
void check_entries(const ObservedEntries<T>& entries) {
  const SparseRows<T>&a = entries.by_rows, &b = entries.by_columns;
  if (a.rows != b.cols || a.cols != b.rows) {
    throw ShapeError("the entries are " + std::to_string(a.rows) + " x " + std::to_string(a.cols) +
                     " by rows and " + std::to_string(b.cols) + " x " + std::to_string(b.rows) +
                     " by columns");
  }
  check_rows(a, "the entries by rows");
  check_rows(b, "the entries by columns");
  require_length(b.size, a.size, "the entries by columns");
}

namespace {

// How many starts there are for so many rows or columns, as is_out_of_cache as indices of 32 bits reach.
Index count_starts(Index n, const char* name) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  if (n >= 0 && n <= most) return n + 1;
  throw ShapeError(std::string(name) + " is " + std::to_string(n) + "; wanted 0 to " +
                   std::to_string(most));
}

}  // namespace

template <class T>
Index sort_entries(ArrayRef<const std::int64_t, 1> row_of, ArrayRef<const std::int64_t, 1> col_of,
                   ArrayRef<const T, 1> value_of, Index rows, Index cols,
                   ArrayRef<std::int64_t, 1> starts, ArrayRef<std::int32_t, 1> indices,
                   ArrayRef<T, 1> sorted) {
  Index n = row_of.shape[0];
  require_length(col_of.shape[0], n, "col");
  require_length(value_of.shape[0], n, "value");
  count_starts(cols, "cols");
  require_room(starts, count_starts(rows, "rows"), {}, "start");
  require_room(indices, n, {}, "index");
  require_room(sorted, n, {}, "values");
  const std::int64_t *const row = row_of.data, *const col = col_of.data;
  std::int64_t* const start = starts.data;
  std::int32_t* const index = indices.data;
  T* const values = sorted.data;
  // Ignore all entries after the first one outside; an earlier entry may still be a repetition.
  Index outside = -1;
  for (Index e = 0; e < n; ++e) {
    if (row[e] < 0 || row[e] >= rows || col[e] < 0 || col[e] >= cols) {
      outside = n = e;
    }
  }
  // Sort by columns first, then stably by rows, so that columns ascend within each row.
  std::vector<Index> next_position(static_cast<std::size_t>(std::max(rows, cols)) + 1, 0);
  std::vector<Index> by_column(static_cast<std::size_t>(n));
  for (Index e = 0; e < n; ++e) ++next_position[col[e] + 1];
  for (Index j = 0; j < cols; ++j) next_position[j + 1] += next_position[j];
  for (Index e = 0; e < n; ++e) by_column[next_position[col[e]]++] = e;
  std::fill(start, start + rows + 1, 0);
  for (Index e = 0; e < n; ++e) ++start[row[e] + 1];
  for (Index i = 0; i < rows; ++i) start[i + 1] += start[i];
  std::copy(start, start + rows, next_position.begin());
  Index repeated = -1;
  for (Index c = 0; c < n; ++c) {
    const Index e = by_column[c];
    const Index to = next_position[row[e]]++;
    index[to] = static_cast<std::int32_t>(col[e]);
    values[to] = value_of.data[e];
    // Equal positions are adjacent, in the order of the input.
    if (to > start[row[e]] && index[to - 1] == index[to]) {
      repeated = repeated < 0 ? e : std::min(repeated, e);
    }
  }
  return repeated >= 0 ? repeated : outside;
}

template <class T>
void transpose_entries(const SparseRows<T>& by_rows, ArrayRef<std::int64_t, 1> starts,
                       ArrayRef<std::int32_t, 1> indices, ArrayRef<T, 1> sorted) {
  const Index n_starts = count_starts(by_rows.cols, "cols");
  check_rows(by_rows, "the entries by rows");
  const Index n = by_rows.size;
  require_room(starts, n_starts, {}, "start");
  require_room(indices, n, {}, "index");
  require_room(sorted, n, {}, "values");
  std::int64_t* const start = starts.data;
  std::int32_t* const index = indices.data;
  T* const values = sorted.data;
  std::fill(start, start + by_rows.cols + 1, 0);
  for (Index e = 0; e < n; ++e) ++start[by_rows.index[e] + 1];
  for (Index j = 0; j < by_rows.cols; ++j) start[j + 1] += start[j];
  std::vector<Index> next_position(start, start + by_rows.cols);
  for (Index i = 0; i < by_rows.rows; ++i) {
    for (Index at = by_rows.start[i]; at < by_rows.start[i + 1]; ++at) {
      const Index to = next_position[by_rows.index[at]]++;
      index[to] = static_cast<std::int32_t>(i);
      values[to] = by_rows.values[at];
    }
  }
}

template <class T>
double residual_products(const ObservedEntries<T>& entries, MatrixRef<const T> x,
                         MatrixRef<const T> y, MatrixRef<T> left, MatrixRef<T> right,
                         const Context& context) {
  const Index k = x.rows, m = entries.rows(), n = entries.cols();
  require_shape(x, k, m, "the left factor");
  require_shape(y, k, n, "the right factor");
  if (!left.absent()) require_shape(left, k, m, "the product with the right factor");
  if (!right.absent()) require_shape(right, k, n, "the product with the left factor");
  context.poll();

  const Index stride = vectors_of<T>(k) * lanes<T>;
  const Index row_chunks = count_chunks(entries.by_rows);
  const Index column_chunks = right.absent() ? 0 : count_chunks(entries.by_columns);
  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  // The sums of the chunks and their losses are stored behind the pieces.
  const Index n_sums = vectors_of<T>(k) > max_register_vectors ? row_chunks + column_chunks : 0;
  const Index n_losses = row_chunks * static_cast<Index>(sizeof(double) / sizeof(T));
  T* const left_pieces = workspace.reserve<T>((m + n + n_sums) * stride + n_losses);
  T* const right_pieces = left_pieces + m * stride;
  T* const sum_buffers = right_pieces + n * stride;
  auto* const losses = reinterpret_cast<double*>(sum_buffers + n_sums * stride);

  const double size = static_cast<double>(entries.by_rows.size);
  const double flops = (right.absent() ? 4.0 : 8.0) * size * static_cast<double>(stride);
  const int team = team_size(context.n_threads, flops, flops_per_thread);
  const Index left_chunks = (m + pieces_per_chunk - 1) / pieces_per_chunk;
  const Index right_chunks = (n + pieces_per_chunk - 1) / pieces_per_chunk;
  parallel_dynamic(team, left_chunks + right_chunks, [&](Index c) {
    const bool of_left = c < left_chunks;
    const Index begin = (of_left ? c : c - left_chunks) * pieces_per_chunk;
    const MatrixRef<const T>& block = of_left ? x : y;
    gather_pieces<T>(block, begin, std::min(begin + pieces_per_chunk, block.cols),
                     of_left ? left_pieces : right_pieces);
  });

  // With X = 0, as in products with Omega * Phi alone, half of the work is not needed. An infinite
  // entry of Y is multiplied all the same, so that it stays visible.
  const bool is_zero = all_zero<T>(x) && y.map().allFinite();
  const Pass<T> rows{&entries.by_rows, left_pieces, right_pieces, left, is_zero};
  const Pass<T> columns{&entries.by_columns, right_pieces, left_pieces, right, is_zero};
  parallel_dynamic(team, row_chunks + column_chunks, [&](Index c) {
    const bool of_rows = c < row_chunks;
    const Pass<T>& pass = of_rows ? rows : columns;
    const Index chunks = of_rows ? row_chunks : column_chunks;
    const Index chunk = of_rows ? c : c - row_chunks;
    const Index begin = chunk_begin(*pass.entries, chunk, chunks);
    const Index end = chunk_begin(*pass.entries, chunk + 1, chunks);
    T* const sum_buffer = n_sums > 0 ? sum_buffers + c * stride : nullptr;
    const double loss = run_rows<T>(pass, begin, end, k, sum_buffer);
    if (of_rows) losses[chunk] = loss;
  });
  double total = 0.0;
  for (Index c = 0; c < row_chunks; ++c) total += losses[c];
  return total;
}

template <class T>
double masked_residual(const SparseRows<T>& by_rows, MatrixRef<const T> m, MatrixRef<T> error,
                       const Context& context) {
  require_shape(m, by_rows.rows, by_rows.cols, "the matrix");
  require_shape(error, by_rows.rows, by_rows.cols, "the residual");
  context.poll();
  const Index n_chunks = count_chunks(by_rows);
  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  double* const losses = workspace.reserve<double>(n_chunks);
  const double work = static_cast<double>(by_rows.rows) * static_cast<double>(by_rows.cols);
  parallel_dynamic(team_size(context.n_threads, work, 65536.0), n_chunks, [&](Index c) {
    const Index end = chunk_begin(by_rows, c + 1, n_chunks);
    double loss = 0.0;
    for (Index i = chunk_begin(by_rows, c, n_chunks); i < end; ++i) {
      T* const e = error.row(i);
      const T* const w = m.row(i);
      std::fill(e, e + by_rows.cols, T(0));
      for (Index at = by_rows.start[i]; at < by_rows.start[i + 1]; ++at) {
        const T difference = w[by_rows.index[at]] - by_rows.values[at];
        e[by_rows.index[at]] = difference;
        loss += static_cast<double>(difference) * static_cast<double>(difference);
      }
    }
    losses[c] = loss;
  });
  double total = 0.0;
  for (Index c = 0; c < n_chunks; ++c) total += losses[c];
  return total;
}

template <class T>
double measured_residual(const Measurements<T>& measurements, MatrixRef<const T> m,
                         MatrixRef<T> error, const Context& context) {
  const MatrixRef<const T>& b = measurements.operators;
  const Index size = m.rows * m.cols;
  require_shape(error, m.rows, m.cols, "the residual");
  require_shape(b, b.rows, size, "the measurement operators");
  if (m.stride != m.cols || error.stride != error.cols) {
    throw ShapeError("a measured matrix is not contiguous");
  }
  context.poll();
  // Each chunk of measurements has its own sum; adding up more chunks would cost more time than
  // they save.
  constexpr Index max_chunks = 8;
  constexpr Index elements_per_chunk = 65536;
  const Index n_chunks = std::clamp<Index>(b.rows * size / elements_per_chunk, 1, max_chunks);
  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  double* const losses = workspace.reserve<double>(n_chunks + n_chunks * size);
  T* const sums = reinterpret_cast<T*>(losses + n_chunks);
  using Row = Eigen::Matrix<T, 1, Eigen::Dynamic>;
  const Eigen::Map<const Row> w(m.data, size);
  const double flops = 4.0 * static_cast<double>(b.rows) * static_cast<double>(size);
  const int team = team_size(context.n_threads, flops, flops_per_thread);
  parallel_dynamic(team, n_chunks, [&](Index c) {
    Eigen::Map<Row> sum(sums + c * size, size);
    sum.setZero();
    double loss = 0.0;
    const Share range = share(b.rows, 1, c, n_chunks);
    for (Index i = range.begin; i < range.end; ++i) {
      const Eigen::Map<const Row> row(b.row(i), size);
      const T residual = row.dot(w) - measurements.values[i];
      sum += residual * row;
      loss += static_cast<double>(residual) * static_cast<double>(residual);
    }
    losses[c] = loss;
  });
  Eigen::Map<Row> e(error.data, size);
  e = Eigen::Map<const Row>(sums, size);
  double total = losses[0];
  for (Index c = 1; c < n_chunks; ++c) {
    e += Eigen::Map<const Row>(sums + c * size, size);
    total += losses[c];
  }
  return total;
}

#define DLNFAST_INSTANTIATE(T)                                                                     \
  template void check_rows<T>(const SparseRows<T>&, const char*);                                  \
  template void check_entries<T>(const ObservedEntries<T>&);                                       \
  template Index sort_entries<T>(ArrayRef<const std::int64_t, 1>, ArrayRef<const std::int64_t, 1>, \
                                 ArrayRef<const T, 1>, Index, Index, ArrayRef<std::int64_t, 1>,    \
                                 ArrayRef<std::int32_t, 1>, ArrayRef<T, 1>);                       \
  template void transpose_entries<T>(const SparseRows<T>&, ArrayRef<std::int64_t, 1>,              \
                                     ArrayRef<std::int32_t, 1>, ArrayRef<T, 1>);                   \
  template double residual_products<T>(const ObservedEntries<T>&, MatrixRef<const T>,              \
                                       MatrixRef<const T>, MatrixRef<T>, MatrixRef<T>,             \
                                       const Context&);                                            \
  template double masked_residual<T>(const SparseRows<T>&, MatrixRef<const T>, MatrixRef<T>,       \
                                     const Context&);                                              \
  template double measured_residual<T>(const Measurements<T>&, MatrixRef<const T>, MatrixRef<T>,   \
                                       const Context&);
DLNFAST_INSTANTIATE(float)
DLNFAST_INSTANTIATE(double)
#undef DLNFAST_INSTANTIATE

}  // namespace dlnfast
