// SPDX-License-Identifier: MIT
#include "dlnfast/thin_product.hpp"

#include <algorithm>
#include <type_traits>

#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

// The kernels read thin blocks as panels: the k vectors of the same few columns are stored side by
// side, panel after panel, padded with zeros. A block is then read sequentially, however far apart
// its rows are (at a power of two they would map to the same cache lines), and a column of L or X
// for some rows of W is contiguous as well.
//
// Results indexed by rows: a tile of 4 rows processes W in blocks of columns. In each block it adds
// to the 4 k inner products and then, while its part of W and the panels are in the first-level
// cache, updates W. Per vector of W this takes k multiply-adds for each of the two; one cache line
// of memory is read, and written by an update. Panels are read from the second-level cache once per
// tile.
//
// Results indexed by columns: a tile of 8 rows is held in registers, one or two vectors of columns
// at a time, and for each of the k rows adds 8 multiply-adds to a vector of the result.
//
// Rows (or columns) are distributed over the threads in chunks that depend on sizes alone, and one
// thread sums each result in a fixed order: results do not depend on the number of threads.
namespace dlnfast {
namespace {

constexpr double flops_per_thread = 4e5;
constexpr bool many_registers = simd::n_registers == 32;

template <class T>
using Vector = typename simd::Pack<T>::Vector;

template <class T>
constexpr int lanes = simd::Pack<T>::size;

// Rows of a tile: at most `lanes`, so that its coefficients are in one panel.
template <class T>
constexpr int rows_of_dots = std::min(4, lanes<T>);
template <class T>
constexpr int rows_of_sums = std::min(many_registers ? 8 : 4, lanes<T>);

// Rows of X whose inner products with a tile are held in registers at once, together with these
// rows and a vector of W.
template <class T>
constexpr int group_limit = (many_registers ? 24 : 12) / rows_of_dots<T>;
// Vectors of columns that an update of a tile computes at once.
constexpr int vectors_of_update = many_registers ? 2 : 3;

template <class T>
Index padded(Index n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Packs a block into panels: columns j, j + 1, .. begin at j k, for j a multiple of `lanes`.
template <class T>
void pack(const MatrixRef<const T>& x, T* panels) {
  using P = simd::Pack<T>;
  const Index n_whole = x.cols / P::size * P::size;
  const int remainder = static_cast<int>(x.cols - n_whole);
  for (Index j = 0; j < n_whole; j += P::size) {
    for (Index g = 0; g < x.rows; ++g, panels += P::size) P::store(panels, P::load(x.row(g) + j));
  }
  if (remainder == 0) return;
  for (Index g = 0; g < x.rows; ++g, panels += P::size) {
    P::store(panels, P::load_part(x.row(g) + n_whole, remainder));
  }
}

template <class T>
void unpack(const T* panels, const MatrixRef<T>& y) {
  using P = simd::Pack<T>;
  for (Index j = 0; j < y.cols; j += P::size) {
    const int n = static_cast<int>(std::min<Index>(P::size, y.cols - j));
    for (Index g = 0; g < y.rows; ++g, panels += P::size) {
      if (n == P::size) {
        P::store(y.row(g) + j, P::load(panels));
      } else {
        P::store_part(y.row(g) + j, P::load(panels), n);
      }
    }
  }
}

// Some columns of a row of W: whole vectors, then `remainder` entries.
struct Segment {
  Index n_vectors;
  int remainder;
};
template <class T>
Segment segment(Index n) {
  return {n / lanes<T>, static_cast<int>(n % lanes<T>)};
}

template <class T, bool Part>
DLNFAST_INLINE inline Vector<T> load(const T* p, int remainder) {
  if constexpr (Part) return simd::Pack<T>::load_part(p, remainder);
  return simd::Pack<T>::load(p);
}

template <class T, bool Part>
DLNFAST_INLINE inline void store(T* p, const Vector<T>& v, int remainder) {
  if constexpr (Part) return simd::Pack<T>::store_part(p, v, remainder);
  simd::Pack<T>::store(p, v);
}

// The factors of a gradient step, as the kernels need them.
template <class T>
struct StepFactors {
  T rate, shrink, weight_factor, gradient_factor, momentum, scale, decay;

  explicit StepFactors(const GradientStep<T>& d)
      : rate(d.learning_rate),
        shrink(d.learning_rate * d.weight_decay),
        weight_factor(d.weight_factor()),
        gradient_factor(d.learning_rate * d.scale),
        momentum(d.momentum),
        scale(d.scale),
        decay(d.weight_decay) {}

  template <bool Momentum, bool Part>
  DLNFAST_INLINE void apply(T* w, T* v, const Vector<T>& old, const Vector<T>& gradient,
                            int remainder) const {
    if constexpr (Momentum) {
      const Vector<T> velocity =
          load<T, Part>(v, remainder) * momentum + gradient * scale + old * decay;
      store<T, Part>(v, velocity, remainder);
      store<T, Part>(w, old - velocity * rate, remainder);
    } else {
      const Vector<T> base = old * weight_factor;
      store<T, Part>(w, base - (base * shrink + gradient * gradient_factor), remainder);
    }
  }
};

// Rows of W and, with momentum, of V, from some column on.
template <class T>
struct Rows {
  T* w;
  Index w_stride;
  T* v;
  Index v_stride;
};

// sums[g][r] += x[g] . w[r] along some columns, for Group rows of X and R rows of W. Prefetches the
// lines of W 2 KB ahead, which is beyond this block of columns, into the second-level cache: the
// first one has no room for them.
template <class T, int R, int Group>
void dots_kernel(const T* x, Index k, const T* w, Index w_stride, Segment columns,
                 Vector<T>* sums) {
  using P = simd::Pack<T>;
  constexpr Index ahead = 2048 / static_cast<Index>(sizeof(T));
  Vector<T> s[Group][R];
  simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE { s[g][r] = sums[g * R + r]; });
  });
  const auto add = [&](auto part) DLNFAST_INLINE {
    Vector<T> xv[Group];
    simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
      xv[g] = P::load(x + g * P::size);
      simd::hold_in_register(xv[g]);
    });
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      Vector<T> wv = load<T, decltype(part)::value>(w + r * w_stride, columns.remainder);
      simd::hold_in_register(wv);
      simd::unroll<Group>([&](auto g) DLNFAST_INLINE { s[g][r] += wv * xv[g]; });
    });
  };
  for (Index i = 0; i < columns.n_vectors; ++i, x += k * P::size, w += P::size) {
    simd::unroll<R>([&](auto r)
                        DLNFAST_INLINE { __builtin_prefetch(w + r * w_stride + ahead, 0, 2); });
    add(std::false_type{});
  }
  if (columns.remainder > 0) add(std::true_type{});
  simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE { sums[g * R + r] = s[g][r]; });
  });
}

template <class T, int R, int Group = group_limit<T>>
void dots_of_group(const T* x, Index size, Index k, const T* w, Index w_stride, Segment columns,
                   Vector<T>* sums) {
  if constexpr (Group > 1) {
    if (size < Group) {
      return dots_of_group<T, R, Group - 1>(x, size, k, w, w_stride, columns, sums);
    }
  }
  dots_kernel<T, R, Group>(x, k, w, w_stride, columns, sums);
}

template <class T, int R>
void dots(const T* x, Index k, const T* w, Index w_stride, Segment columns, Vector<T>* sums) {
  // Groups of nearly equal size: 10 rows are 5 + 5, not 6 + 4.
  const Index n_groups = (k + group_limit<T> - 1) / group_limit<T>;
  for (Index group = 0; group < n_groups; ++group) {
    const Index begin = k * group / n_groups;
    const Index size = k * (group + 1) / n_groups - begin;
    const T* xg = x + begin * lanes<T>;
    Vector<T>* sg = sums + begin * R;
    dots_of_group<T, R>(xg, size, k, w, w_stride, columns, sg);
  }
}

// Updates R rows along some columns, C vectors at a time: the gradient is sum_g left[g][r]
// right[g].
template <class T, int R, int C, bool Momentum, bool Part>
DLNFAST_INLINE inline void descend_vectors(const T* left, const T* right, Index k,
                                           const Rows<T>& rows, int remainder,
                                           const StepFactors<T>& factors) {
  using P = simd::Pack<T>;
  Vector<T> gradient[R][C] = {};
  const Index next = k * P::size;  // the panel of the next vector
  for (Index g = 0; g < k; ++g, left += P::size, right += P::size) {
    Vector<T> x[C];
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      x[c] = P::load(right + c * next);
      simd::hold_in_register(x[c]);
    });
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      const Vector<T> coefficient = P::broadcast(left[r]);
      simd::unroll<C>([&](auto c) DLNFAST_INLINE { gradient[r][c] += x[c] * coefficient; });
    });
  }
  simd::unroll<R>([&](auto r) DLNFAST_INLINE {
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      T* w = rows.w + r * rows.w_stride + c * P::size;
      T* v = Momentum ? rows.v + r * rows.v_stride + c * P::size : nullptr;
      factors.template apply<Momentum, Part>(w, v, load<T, Part>(w, remainder), gradient[r][c],
                                             remainder);
    });
  });
}

template <class T, int R, bool Momentum>
void descend_kernel(const T* left, const T* right, Index k, Rows<T> rows, Segment columns,
                    const StepFactors<T>& factors) {
  const auto advance = [&](Index vectors) {
    right += vectors * k * lanes<T>;
    rows.w += vectors * lanes<T>;
    if (Momentum) rows.v += vectors * lanes<T>;
  };
  constexpr int C = vectors_of_update;
  Index i = 0;
  for (; i + C <= columns.n_vectors; i += C) {
    descend_vectors<T, R, C, Momentum, false>(left, right, k, rows, 0, factors);
    advance(C);
  }
  for (; i < columns.n_vectors; ++i) {
    descend_vectors<T, R, 1, Momentum, false>(left, right, k, rows, 0, factors);
    advance(1);
  }
  if (columns.remainder > 0)
    descend_vectors<T, R, 1, Momentum, true>(left, right, k, rows, columns.remainder, factors);
}

// y[g] += sum_r left[g][r] w[r] for C vectors of columns, and updates W if `Updates`.
template <class T, int R, int C, bool Updates, bool Momentum, bool Part>
DLNFAST_INLINE inline void sum_vectors(const T* left, const T* right, Index k, const Rows<T>& rows,
                                       int remainder, T* y, const StepFactors<T>* factors) {
  using P = simd::Pack<T>;
  Vector<T> w[R][C];
  Vector<T> gradient[R][C] = {};
  simd::unroll<R>([&](auto r) DLNFAST_INLINE {
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      const T* p = rows.w + r * rows.w_stride + c * P::size;
      __builtin_prefetch(p + R * rows.w_stride, 0, 2);
      w[r][c] = load<T, Part>(p, remainder);
      simd::hold_in_register(w[r][c]);
    });
  });
  const Index next = k * P::size;
  for (Index g = 0; g < k; ++g, left += P::size, y += P::size) {
    Vector<T> sum[C], x[C];
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      sum[c] = P::load(y + c * next);
      if constexpr (Updates) x[c] = P::load(right + g * P::size + c * next);
    });
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      Vector<T> coefficient = P::broadcast(left[r]);
      simd::hold_in_register(coefficient);
      simd::unroll<C>([&](auto c) DLNFAST_INLINE {
        sum[c] += w[r][c] * coefficient;
        if constexpr (Updates) gradient[r][c] += x[c] * coefficient;
      });
    });
    simd::unroll<C>([&](auto c) DLNFAST_INLINE { P::store(y + c * next, sum[c]); });
  }
  if constexpr (Updates) {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      simd::unroll<C>([&](auto c) DLNFAST_INLINE {
        T* to = rows.w + r * rows.w_stride + c * P::size;
        T* v = Momentum ? rows.v + r * rows.v_stride + c * P::size : nullptr;
        factors->template apply<Momentum, Part>(to, v, w[r][c], gradient[r][c], remainder);
      });
    });
  }
}

template <class T, int R, bool Updates, bool Momentum>
void sums_kernel(const T* left, const T* right, Index k, Rows<T> rows, Segment columns, T* y,
                 const StepFactors<T>* factors) {
  constexpr int C = Updates ? 1 : 2;
  const auto advance = [&](Index vectors) {
    if (Updates) right += vectors * k * lanes<T>;
    y += vectors * k * lanes<T>;
    rows.w += vectors * lanes<T>;
    if (Momentum) rows.v += vectors * lanes<T>;
  };
  Index i = 0;
  for (; i + C <= columns.n_vectors; i += C) {
    sum_vectors<T, R, C, Updates, Momentum, false>(left, right, k, rows, 0, y, factors);
    advance(C);
  }
  if (i < columns.n_vectors) {
    sum_vectors<T, R, 1, Updates, Momentum, false>(left, right, k, rows, 0, y, factors);
    advance(1);
  }
  if (columns.remainder > 0) {
    sum_vectors<T, R, 1, Updates, Momentum, true>(left, right, k, rows, columns.remainder, y,
                                                  factors);
  }
}

// The operands of one pass. Absent ones have no data.
template <class T>
struct Pass {
  MatrixRef<const T> left;   // k x m
  MatrixRef<const T> right;  // k x n
  MatrixRef<T> w;            // m x n; written only by a gradient step
  MatrixRef<T> row_result;   // k x m: right * W^T
  MatrixRef<T> col_result;   // k x n: left * W
  const GradientStep<T>* step = nullptr;

  Index k() const { return left.absent() ? right.rows : left.rows; }
  bool has_momentum() const { return step != nullptr && !step->velocity.absent(); }
};

// The panels of a pass.
template <class T>
struct Panels {
  T* left = nullptr;
  T* right = nullptr;
  T* result = nullptr;  // of columns
};

template <class T>
Rows<T> rows_from(const Pass<T>& p, Index i, Index j) {
  Rows<T> rows{p.w.row(i) + j, p.w.stride, nullptr, 0};
  if (p.has_momentum()) {
    const MatrixRef<T>& v = p.step->velocity;
    rows.v = v.row(i) + j;
    rows.v_stride = v.stride;
  }
  return rows;
}

// Returns the k coefficients of row i, `lanes` apart.
template <class T>
const T* coefficients(const T* left, Index k, Index i) {
  return left + i / lanes<T> * (lanes<T> * k) + i % lanes<T>;
}

// Calls tile(i, R) for tiles of R rows, then of half as many, down to single rows.
template <int R, class Tile>
void for_tiles(Index begin, Index end, const Tile& tile) {
  for (; begin + R <= end; begin += R) tile(begin, std::integral_constant<int, R>{});
  if constexpr (R > 1) {
    if (begin < end) for_tiles<R / 2>(begin, end, tile);
  }
}

template <class T>
void run_rows(const Pass<T>& p, const Panels<T>& panels, Share share) {
  const Index k = p.k();
  const Index n = p.w.cols;
  // As many columns as fit the first-level cache together with the panels, but enough to make
  // loading and storing the sums cheap.
  constexpr Index bytes = 24 * 1024;
  const Index line = lanes<T> * static_cast<Index>(sizeof(T));
  const Index min_vectors = k > 32 ? 48 : 24;
  const Index max_columns = std::max(bytes / ((k + rows_of_dots<T>)*line), min_vectors) * lanes<T>;
  const Index n_blocks = (n + max_columns - 1) / max_columns;
  const Index block_width = padded<T>((n + n_blocks - 1) / n_blocks);
  const StepFactors<T> factors(p.step != nullptr ? *p.step : GradientStep<T>{});
  for_tiles<rows_of_dots<T>>(share.begin, share.end, [&](Index i, auto r) {
    constexpr int R = decltype(r)::value;
    Vector<T> sums[thin_limit * R];
    if (!p.row_result.absent()) std::fill(sums, sums + k * R, Vector<T>{});
    for (Index j = 0; j < n; j += block_width) {
      const Segment columns = segment<T>(std::min(block_width, n - j));
      const Rows<T> rows = rows_from(p, i, j);
      const T* right = panels.right + j * k;
      if (!p.row_result.absent()) {
        dots<T, R>(right, k, rows.w, rows.w_stride, columns, sums);
      }
      if (p.step == nullptr) continue;
      const T* left = coefficients<T>(panels.left, k, i);
      if (p.has_momentum()) {
        descend_kernel<T, R, true>(left, right, k, rows, columns, factors);
      } else {
        descend_kernel<T, R, false>(left, right, k, rows, columns, factors);
      }
    }
    if (p.row_result.absent()) return;
    for (Index g = 0; g < k; ++g) {
      for (int row = 0; row < R; ++row) {
        p.row_result.row(g)[i + row] = simd::Pack<T>::sum(sums[g * R + row]);
      }
    }
  });
}

template <class T>
void run_columns(const Pass<T>& p, const Panels<T>& panels, Share share) {
  const Index k = p.k();
  const Index n = share.end - share.begin;
  T* y = panels.result + share.begin * k;
  std::fill(y, y + padded<T>(n) * k, T(0));
  const StepFactors<T> factors(p.step != nullptr ? *p.step : GradientStep<T>{});
  const T* right = p.step != nullptr ? panels.right + share.begin * k : nullptr;
  for_tiles<rows_of_sums<T>>(0, p.w.rows, [&](Index i, auto r) {
    constexpr int R = decltype(r)::value;
    const Rows<T> rows = rows_from(p, i, share.begin);
    const T* left = coefficients<T>(panels.left, k, i);
    if (p.step == nullptr) {
      sums_kernel<T, R, false, false>(left, right, k, rows, segment<T>(n), y, &factors);
    } else if (p.has_momentum()) {
      sums_kernel<T, R, true, true>(left, right, k, rows, segment<T>(n), y, &factors);
    } else {
      sums_kernel<T, R, true, false>(left, right, k, rows, segment<T>(n), y, &factors);
    }
  });
  unpack<T>(y, p.col_result.block(0, share.begin, k, n));
}

template <class T>
void run(const Pass<T>& p, const Context& context) {
  const Index m = p.w.rows;
  const Index n = p.w.cols;
  const Index k = p.k();
  if (m == 0 || n == 0 || (k == 0 && p.step == nullptr)) {
    if (!p.row_result.absent()) p.row_result.map().setZero();
    if (!p.col_result.absent()) p.col_result.map().setZero();
    return;
  }
  context.poll();

  Workspace own;
  Workspace& workspace = context.workspace != nullptr ? *context.workspace : own;
  const bool by_columns = !p.col_result.absent();
  const Index left_size = p.left.absent() ? 0 : padded<T>(m) * k;
  const Index right_size = p.right.absent() ? 0 : padded<T>(n) * k;
  const Index result_size = by_columns ? padded<T>(n) * k : 0;
  Panels<T> panels;
  panels.left = workspace.reserve<T>(left_size + right_size + result_size);
  panels.right = panels.left + left_size;
  panels.result = panels.right + right_size;
  if (left_size > 0) pack<T>(p.left, panels.left);
  if (right_size > 0) pack<T>(p.right, panels.right);

  const int n_terms = (p.row_result.absent() ? 0 : 1) + (by_columns ? 1 : 0) + (p.step ? 1 : 0);
  const double flops =
      2.0 * n_terms * static_cast<double>(k) * static_cast<double>(m) * static_cast<double>(n);
  // Chunks of columns keep the result in the second-level cache, and still read some memory pages
  // of each row at a time.
  const Index extent = by_columns ? n : m;
  const Index widest = 16384 / std::max<Index>(k, 1) / lanes<T>;
  const Index chunk = by_columns ? std::clamp<Index>(widest, 32, 64) * lanes<T> : 32;
  const Index n_chunks = (extent + chunk - 1) / chunk;
  int team = team_size(context.n_threads, flops, flops_per_thread);
  team = static_cast<int>(std::min<Index>(team, n_chunks));
  parallel_dynamic(team, n_chunks, [&](Index c) {
    const Share range{c * chunk, std::min((c + 1) * chunk, extent)};
    if (by_columns) {
      run_columns(p, panels, range);
    } else {
      run_rows(p, panels, range);
    }
  });
}

void require_thin(Index k) {
  if (k > thin_limit) {
    throw ShapeError("a thin block has " + std::to_string(k) + " rows; wanted at most " +
                     std::to_string(thin_limit));
  }
}

template <class T>
void require_step_shapes(MatrixRef<const T> left, MatrixRef<const T> right, const MatrixRef<T>& w,
                         const GradientStep<T>& step) {
  require_thin(left.rows);
  require_shape(left, left.rows, w.rows, "the left block of an update");
  require_shape(right, left.rows, w.cols, "the right block of an update");
  if (!step.velocity.absent() || step.momentum != T(0)) {
    require_shape(step.velocity, w.rows, w.cols, "the velocity");
  }
}

template <class T>
MatrixRef<T> without_const(MatrixRef<const T> w) {
  // A pass without a gradient step never writes W.
  return {const_cast<T*>(w.data), w.rows, w.cols, w.stride};
}

}  // namespace

template <class T>
void thin_times_transpose(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                          const Context& context) {
  require_thin(x.rows);
  require_shape(x, x.rows, w.cols, "the thin block");
  require_shape(y, x.rows, w.rows, "the result of a thin product");
  Pass<T> p;
  p.right = x;
  p.w = without_const<T>(w);
  p.row_result = y;
  run(p, context);
}

template <class T>
void thin_times(MatrixRef<const T> x, MatrixRef<const T> w, MatrixRef<T> y,
                const Context& context) {
  require_thin(x.rows);
  require_shape(x, x.rows, w.rows, "the thin block");
  require_shape(y, x.rows, w.cols, "the result of a thin product");
  Pass<T> p;
  p.left = x;
  p.w = without_const<T>(w);
  p.col_result = y;
  run(p, context);
}

template <class T>
void thin_times_transpose_and_descend(MatrixRef<const T> left, MatrixRef<const T> right,
                                      MatrixRef<T> w, MatrixRef<T> y, const GradientStep<T>& step,
                                      const Context& context) {
  require_step_shapes(left, right, w, step);
  require_shape(y, right.rows, w.rows, "the result of a thin product");
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.row_result = y;
  p.step = &step;
  run(p, context);
}

template <class T>
void thin_times_and_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                            MatrixRef<T> y, const GradientStep<T>& step, const Context& context) {
  require_step_shapes(left, right, w, step);
  require_shape(y, left.rows, w.cols, "the result of a thin product");
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.col_result = y;
  p.step = &step;
  run(p, context);
}

template <class T>
void thin_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                  const GradientStep<T>& step, const Context& context) {
  require_step_shapes(left, right, w, step);
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.step = &step;
  run(p, context);
}

#define DLNFAST_INSTANTIATE(T)                                                                   \
  template void thin_times_transpose<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,    \
                                        const Context&);                                         \
  template void thin_times<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,              \
                              const Context&);                                                   \
  template void thin_times_transpose_and_descend<T>(MatrixRef<const T>, MatrixRef<const T>,      \
                                                    MatrixRef<T>, MatrixRef<T>,                  \
                                                    const GradientStep<T>&, const Context&);     \
  template void thin_times_and_descend<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,  \
                                          MatrixRef<T>, const GradientStep<T>&, const Context&); \
  template void thin_descend<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,            \
                                const GradientStep<T>&, const Context&);
DLNFAST_INSTANTIATE(float)
DLNFAST_INSTANTIATE(double)
#undef DLNFAST_INSTANTIATE

}  // namespace dlnfast
