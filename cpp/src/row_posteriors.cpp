// SPDX-License-Identifier: MIT
#include "dlnfast/row_posteriors.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>

#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/sparse_rows.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

// The sums of a row take one pass over its entries, each with the moments of a column: a stream of memory,
// with one multiplication per number. The small systems are then solved for as many rows at a time as a
// vector has lanes, one row per lane.
namespace dlnfast {
namespace {

constexpr double flops_per_thread = 4e5;
// Entries whose moments are added together: the sums are loaded and stored once for all.
constexpr int group = 4;
// Chunks between two polls for interrupts.
constexpr Index chunks_per_poll = 64;

template <class T>
using Vector = typename simd::Pack<T>::Vector;

template <class T>
constexpr int lanes = simd::Pack<T>::size;

// The packed lower triangle of the moments.
struct Layout {
  explicit Layout(Index k)
      : d(k + 1), means(k * (k + 1) / 2), bias(d * (d + 1) / 2), size(count_moments(k)) {}
  static Index at(Index a, Index b) { return a * (a + 1) / 2 + b; }
  Index d;      // entries of u = (f, a) and of h = (g, 1)
  Index means;  // the row of the 1
  Index bias;   // the row of the bias
  Index size;
};

// What the entries of one row add up to, before the precision of the row.
template <class T>
struct RowSums {
  T* moments;                           // sum of weight E[(g, 1, b) (g, 1, b)^T], packed
  T* targets;                           // sum of weight value E[h]
  double squares = 0.0, crossed = 0.0;  // sums of weight value^2 and weight value E[b]
};

template <class T>
void add_entries(const SparseRows<T>& entries, const MatrixRef<const T>& others, const T* weights,
                 const T* entry_weights, const Layout& layout, Index row, RowSums<T>& sums) {
  using P = simd::Pack<T>;
  const Index stride = others.cols;
  const Index d = layout.d, whole = d / P::size * P::size;
  const int rest = static_cast<int>(d - whole);
  std::fill(sums.moments, sums.moments + stride, T(0));
  std::fill(sums.targets, sums.targets + d, T(0));
  sums.squares = sums.crossed = 0.0;
  const Index stop = entries.start[row + 1];
  for (Index at = entries.start[row]; at < stop; at += group) {
    const T* from[group];
    T weight[group], product[group];
    // A last group with fewer entries repeats one with weight 0.
    for (int g = 0; g < group; ++g) {
      const Index e = std::min(at + g, stop - 1);
      const Index column = entries.index[e];
      from[g] = others.row(column);
      weight[g] = at + g < stop ? weights[column] : T(0);
      if (entry_weights != nullptr) weight[g] *= entry_weights[e];
      product[g] = weight[g] * entries.values[e];
      sums.squares += static_cast<double>(product[g]) * static_cast<double>(entries.values[e]);
      sums.crossed +=
          static_cast<double>(product[g]) * static_cast<double>(from[g][layout.bias + d - 1]);
    }
    for (Index v = 0; v < stride; v += P::size) {
      Vector<T> sum = P::load(sums.moments + v);
      for (int g = 0; g < group; ++g) sum += weight[g] * P::load(from[g] + v);
      P::store(sums.moments + v, sum);
    }
    for (Index v = 0; v < whole; v += P::size) {
      Vector<T> sum = P::load(sums.targets + v);
      for (int g = 0; g < group; ++g) sum += product[g] * P::load(from[g] + layout.means + v);
      P::store(sums.targets + v, sum);
    }
    if (rest > 0) {
      Vector<T> sum = P::load_part(sums.targets + whole, rest);
      for (int g = 0; g < group; ++g) {
        sum += product[g] * P::load_part(from[g] + layout.means + whole, rest);
      }
      P::store_part(sums.targets + whole, sum, rest);
    }
  }
}

// Scratch memory of one thread: sums of a row, and systems with one row per lane.
template <class T>
struct Scratch {
  Scratch(T* memory, const Layout& layout, Index stride) {
    const Index n = lanes<T>;
    moments = memory;
    targets = moments + stride;
    gram = targets + round_up(layout.d);
    system = gram + n * layout.bias;
    right = system + n * layout.bias;
    shifted = right + n * layout.d;
    solution = shifted + n * layout.d;
  }
  static Index count(const Layout& layout, Index stride) {
    const Index n = lanes<T>;
    return round_up(stride + round_up(layout.d) + n * (2 * layout.bias + 3 * layout.d));
  }
  static Index round_up(Index n) { return (n + 15) / 16 * 16; }

  T *moments, *targets;
  // Packed triangles and vectors of `lanes` rows: entry e of row r is at e * lanes + r.
  T *gram, *system, *right, *shifted, *solution;
};

// Entry (a, b) of packed triangles, of all lanes.
template <class T>
T* entry(T* system, Index a, Index b) {
  return system + Layout::at(a, b) * lanes<std::remove_const_t<T>>;
}

// The lower factor L of a packed matrix L L^T, with the inverses of the pivots on its diagonal.
template <class T>
void factorize(T* system, Index d) {
  using P = simd::Pack<T>;
  for (Index a = 0; a < d; ++a) {
    for (Index b = 0; b <= a; ++b) {
      Vector<T> sum = P::load(entry(system, a, b));
      const Vector<T> before = sum;
      for (Index c = 0; c < b; ++c)
        sum -= P::load(entry(system, a, c)) * P::load(entry(system, b, c));
      if (b < a) {
        P::store(entry(system, a, b), sum * P::load(entry(system, b, b)));
        continue;
      }
      for (int r = 0; r < P::size; ++r) {
        // Rounding can leave nothing of a pivot, as the matrix is positive definite.
        const T least = std::numeric_limits<T>::epsilon() * before[r];
        sum[r] = T(1) / std::sqrt(std::max(sum[r], least));
      }
      P::store(entry(system, a, a), sum);
    }
  }
}

// Replaces the factor by its inverse.
template <class T>
void invert_factor(T* system, Index d) {
  using P = simd::Pack<T>;
  for (Index a = 0; a < d; ++a) {
    const Vector<T> pivot = P::load(entry(system, a, a));
    for (Index b = 0; b < a; ++b) {
      Vector<T> sum = {};
      for (Index c = b; c < a; ++c)
        sum += P::load(entry(system, a, c)) * P::load(entry(system, c, b));
      P::store(entry(system, a, b), -(pivot * sum));
    }
  }
}

// Replaces the inverse factor I by I^T I.
template <class T>
void square_factor(T* system, Index d) {
  using P = simd::Pack<T>;
  for (Index a = 0; a < d; ++a) {
    for (Index b = 0; b <= a; ++b) {
      Vector<T> sum = {};
      for (Index c = a; c < d; ++c)
        sum += P::load(entry(system, c, a)) * P::load(entry(system, c, b));
      P::store(entry(system, a, b), sum);
    }
  }
}

// solution = I^T I right, for the inverse factor I.
template <class T>
void solve(const T* system, const T* right, T* solution, Index d) {
  using P = simd::Pack<T>;
  for (Index a = d - 1; a >= 0; --a) {
    Vector<T> sum = {};
    for (Index b = 0; b <= a; ++b)
      sum += P::load(entry(system, a, b)) * P::load(right + b * P::size);
    P::store(solution + a * P::size, sum);
  }
  for (Index b = 0; b < d; ++b) {
    Vector<T> sum = {};
    for (Index a = b; a < d; ++a)
      sum += P::load(entry(system, a, b)) * P::load(solution + a * P::size);
    P::store(solution + b * P::size, sum);
  }
}

template <class T>
class Posteriors {
 public:
  Posteriors(const SparseRows<T>& entries, const MatrixRef<const T>& others,
             const ArrayRef<const T, 1>& weights, const T* entry_weights,
             const ArrayRef<const T, 1>& precisions, const RowPrior<T>& prior, bool uncertain,
             const MatrixRef<T>& moments, const ArrayRef<double, 1>& errors)
      : entries_(entries),
        others_(others),
        weights_(weights.data),
        entry_weights_(entry_weights),
        precisions_(precisions.data),
        prior_(prior),
        uncertain_(uncertain),
        moments_(moments),
        errors_(errors.data),
        layout_(prior.precision.rows - 1) {}

  // Computes rows begin .. end - 1.
  void run(Index begin, Index end, const Scratch<T>& scratch) const {
    for (Index first = begin; first < end; first += lanes<T>) {
      run_batch(first, static_cast<int>(std::min<Index>(lanes<T>, end - first)), scratch);
    }
  }

 private:
  using P = simd::Pack<T>;

  void run_batch(Index first, int n, const Scratch<T>& scratch) const {
    const Index d = layout_.d;
    Vector<T> precision = {};
    double squares[lanes<T>];
    for (int r = 0; r < lanes<T>; ++r) {
      // The remaining lanes repeat the first row; their results are not stored.
      const Index i = first + (r < n ? r : 0);
      RowSums<T> sums{scratch.moments, scratch.targets};
      add_entries(entries_, others_, weights_, entry_weights_, layout_, i, sums);
      precision[r] = precisions_[i];
      squares[r] =
          sums.squares - 2.0 * sums.crossed + static_cast<double>(sums.moments[layout_.size - 1]);
      for (Index e = 0; e < layout_.bias; ++e) scratch.gram[e * lanes<T> + r] = sums.moments[e];
      for (Index a = 0; a < d; ++a) {
        const T target = sums.targets[a] - sums.moments[layout_.bias + a];
        scratch.right[a * lanes<T> + r] = target;
        scratch.shifted[a * lanes<T> + r] = precisions_[i] * target + prior_.shifts.row(i)[a];
      }
    }
    for (Index a = 0; a < d; ++a) {
      for (Index b = 0; b <= a; ++b) {
        const Index at = Layout::at(a, b) * lanes<T>;
        const Vector<T> known = precision * P::load(scratch.gram + at);
        P::store(scratch.system + at, known + prior_.precision.row(a)[b]);
      }
    }
    factorize(scratch.system, d);
    invert_factor(scratch.system, d);
    solve(scratch.system, scratch.shifted, scratch.solution, d);
    if (uncertain_) {
      square_factor(scratch.system, d);
    } else {
      std::fill(scratch.system, scratch.system + layout_.bias * lanes<T>, T(0));
    }
    const Vector<T> changes = replace_by_moments(scratch);
    for (int r = 0; r < n; ++r) {
      errors_[first + r] = std::max(0.0, squares[r] + static_cast<double>(changes[r]));
      store_moments(scratch, r, moments_.row(first + r));
    }
  }

  // Replaces the covariances in `system` by E[u u^T]; returns what u adds to the squared errors.
  Vector<T> replace_by_moments(const Scratch<T>& scratch) const {
    Vector<T> changes = {};
    for (Index a = 0; a < layout_.d; ++a) {
      const Vector<T> mean = P::load(scratch.solution + a * P::size);
      changes -= T(2) * mean * P::load(scratch.right + a * P::size);
      for (Index b = 0; b <= a; ++b) {
        T* const at = scratch.system + Layout::at(a, b) * P::size;
        const Vector<T> moment = P::load(at) + mean * P::load(scratch.solution + b * P::size);
        P::store(at, moment);
        const Vector<T> product = moment * P::load(scratch.gram + Layout::at(a, b) * P::size);
        changes += b < a ? product + product : product;
      }
    }
    return changes;
  }

  // Copies the moments of lane r of a batch to a row: those of u, with those of the 1 in between.
  void store_moments(const Scratch<T>& scratch, int r, T* row) const {
    const Index d = layout_.d;
    for (Index e = 0; e < layout_.means; ++e) row[e] = scratch.system[e * lanes<T> + r];
    for (Index a = 0; a + 1 < d; ++a) row[layout_.means + a] = scratch.solution[a * lanes<T> + r];
    row[layout_.means + d - 1] = T(1);
    T* const bias = row + layout_.bias;
    const T* const last = scratch.system + layout_.means * lanes<T>;
    for (Index a = 0; a + 1 < d; ++a) bias[a] = last[a * lanes<T> + r];
    bias[d - 1] = scratch.solution[(d - 1) * lanes<T> + r];
    bias[d] = last[(d - 1) * lanes<T> + r];
    std::fill(row + layout_.size, row + moments_.cols, T(0));
  }

  const SparseRows<T>& entries_;
  const MatrixRef<const T> others_;
  const T* weights_;
  const T* entry_weights_;
  const T* precisions_;
  const RowPrior<T>& prior_;
  bool uncertain_;
  const MatrixRef<T> moments_;
  double* errors_;
  Layout layout_;
};

}  // namespace

template <class T>
void row_posteriors(const SparseRows<T>& entries, MatrixRef<const T> others,
                    ArrayRef<const T, 1> weights,
                    const std::optional<ArrayRef<const T, 1>>& entry_weights,
                    ArrayRef<const T, 1> precisions, const RowPrior<T>& prior, bool uncertain,
                    MatrixRef<T> moments, ArrayRef<double, 1> errors, const Context& context) {
  const Index d = prior.precision.rows, m = entries.rows;
  require_shape(prior.precision, d, d, "prior[0]");
  if (d < 1) throw ShapeError("prior[0] is empty");
  const Index length = padded_moments(d - 1);
  require_shape(others, entries.cols, length, "others");
  require_length(weights.shape[0], entries.cols, "weights");
  if (entry_weights) require_length(entry_weights->shape[0], entries.size, "entry_weights");
  require_length(precisions.shape[0], m, "precisions");
  require_shape(prior.shifts, m, d, "prior[1]");
  require_shape(moments, m, length, "moments");
  require_length(errors.shape[0], m, "errors");
  check_rows(entries, "entries");

  const Layout layout(d - 1);
  const double size = static_cast<double>(entries.size), rows = static_cast<double>(m);
  const double flops = 2.0 * static_cast<double>(length) * size +
                       static_cast<double>(d * d) * static_cast<double>(d) * rows;
  const int team = team_size(context.n_threads, flops, flops_per_thread);
  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  const Index each = Scratch<T>::count(layout, length);
  T* const memory = workspace.reserve<T>(each * team);
  const Posteriors<T> posteriors(entries, others, weights,
                                 entry_weights ? entry_weights->data : nullptr, precisions, prior,
                                 uncertain, moments, errors);
  const Index n_chunks = count_chunks(entries);
  for (Index begin = 0; begin < n_chunks; begin += chunks_per_poll) {
    context.poll();
    std::atomic<Index> next = begin;
    const Index end = std::min(begin + chunks_per_poll, n_chunks);
    parallel(team, [&](int member, int) {
      const Scratch<T> scratch(memory + member * each, layout, length);
      for (Index c = next++; c < end; c = next++) {
        posteriors.run(chunk_begin(entries, c, n_chunks), chunk_begin(entries, c + 1, n_chunks),
                       scratch);
      }
    });
  }
}

#define DLNFAST_INSTANTIATE(T)                                                                    \
  template void row_posteriors<T>(const SparseRows<T>&, MatrixRef<const T>, ArrayRef<const T, 1>, \
                                  const std::optional<ArrayRef<const T, 1>>&,                     \
                                  ArrayRef<const T, 1>, const RowPrior<T>&, bool, MatrixRef<T>,   \
                                  ArrayRef<double, 1>, const Context&);
DLNFAST_INSTANTIATE(float)
DLNFAST_INSTANTIATE(double)
#undef DLNFAST_INSTANTIATE

}  // namespace dlnfast
