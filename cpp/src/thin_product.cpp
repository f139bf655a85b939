// SPDX-License-Identifier: MIT
#include "dlnfast/thin_product.hpp"

#include <algorithm>
#include <type_traits>

#include "dlnfast/errors.hpp"
#include "dlnfast/simd.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"

// The kernels read thin blocks as panels: the k vectors that belong to the same few columns side by
// side, panel after panel, padded with zeros. So a block is read from its first byte to its last
// however far apart its rows lie (at a power of two they would fall on the same lines of the cache),
// and a column of L or X for some rows of W stands in one piece as well.
//
// Results indexed by rows: a tile of 4 rows walks along W in blocks of columns. In a block it adds to
// the 4 k inner products and then, while its part of W and the panels are in the first-level cache,
// descends. Per vector of W that is k multiply-adds for each of the two and one line of memory read,
// and written by a descent; panels come from the second-level cache once per tile.
//
// Results indexed by columns: a tile of 8 rows is held in registers, one or two vectors of columns at
// a time, and for each of the k rows gives 8 multiply-adds to a vector of the result.
//
// Rows (or columns) are dealt to the team in chunks that depend on sizes alone, and every result is
// summed by one thread in one order: it does not depend on the team.
namespace dlnfast {
namespace {

constexpr double flops_per_thread = 4e5;
constexpr bool many_registers = simd::n_registers == 32;

template <class T>
using Vector = typename simd::Pack<T>::Vector;

template <class T>
constexpr int lanes = simd::Pack<T>::size;

// Rows of a tile: at most `lanes`, so that its coefficients stand in one panel.
template <class T>
constexpr int rows_of_dots = std::min(4, lanes<T>);
template <class T>
constexpr int rows_of_sums = std::min(many_registers ? 8 : 4, lanes<T>);

// Rows of X whose inner products with a tile are in registers at once.
template <class T>
constexpr int group_limit = (many_registers ? 24 : 8) / rows_of_dots<T>;

template <class T>
Index padded(Index n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Columns j, j + 1, .. of a block in panels begin at j k, for j a multiple of `lanes`.
template <class T>
void pack(const MatrixRef<const T>& x, T* panels) {
  using P = simd::Pack<T>;
  const Index whole = x.cols / P::size * P::size;
  const int rest = static_cast<int>(x.cols - whole);
  for (Index j = 0; j < whole; j += P::size) {
    for (Index g = 0; g < x.rows; ++g, panels += P::size) P::store(panels, P::load(x.row(g) + j));
  }
  if (rest == 0) return;
  for (Index g = 0; g < x.rows; ++g, panels += P::size) {
    P::store(panels, P::load_part(x.row(g) + whole, rest));
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

// A stretch of a row of W: whole vectors, then `rest` entries.
struct Stretch {
  Index whole;
  int rest;
};
template <class T>
Stretch stretch(Index n) {
  return {n / lanes<T>, static_cast<int>(n % lanes<T>)};
}

template <class T, bool Part>
DLNFAST_INLINE inline Vector<T> load(const T* p, int rest) {
  if constexpr (Part) return simd::Pack<T>::load_part(p, rest);
  return simd::Pack<T>::load(p);
}

template <class T, bool Part>
DLNFAST_INLINE inline void store(T* p, const Vector<T>& v, int rest) {
  if constexpr (Part) return simd::Pack<T>::store_part(p, v, rest);
  simd::Pack<T>::store(p, v);
}

// The factors of a descent, as the kernels want them.
template <class T>
struct StepRule {
  T rate, shrink, kept, step, momentum, scale, decay;

  explicit StepRule(const Descent<T>& d)
      : rate(d.learning_rate),
        shrink(d.learning_rate * d.weight_decay),
        kept(d.kept()),
        step(d.learning_rate * d.scale),
        momentum(d.momentum),
        scale(d.scale),
        decay(d.weight_decay) {}

  template <bool Momentum, bool Part>
  DLNFAST_INLINE void move(T* w, T* v, const Vector<T>& old, const Vector<T>& gradient,
                           int rest) const {
    if constexpr (Momentum) {
      const Vector<T> speed = load<T, Part>(v, rest) * momentum + gradient * scale + old * decay;
      store<T, Part>(v, speed, rest);
      store<T, Part>(w, old - speed * rate, rest);
    } else {
      const Vector<T> base = old * kept;
      store<T, Part>(w, base - (base * shrink + gradient * step), rest);
    }
  }
};

// Rows of W and, where there is momentum, of V, from some column on.
template <class T>
struct Rows {
  T* w;
  Index w_stride;
  T* v;
  Index v_stride;
};

// sums[g][r] += x[g] . w[r] along a stretch, for Group rows of X and R rows of W. Asks for the lines
// of W 2 KB ahead.
template <class T, int R, int Group>
void dots_kernel(const T* x, Index k, const T* w, Index w_stride, Stretch n, Vector<T>* sums) {
  using P = simd::Pack<T>;
  constexpr Index ahead = 2048 / static_cast<Index>(sizeof(T));
  Vector<T> s[Group][R];
  simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE { s[g][r] = sums[g * R + r]; });
  });
  const auto add = [&](auto part) DLNFAST_INLINE {
    Vector<T> wv[R];
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      wv[r] = load<T, decltype(part)::value>(w + r * w_stride, n.rest);
      simd::keep(wv[r]);
    });
    simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
      const Vector<T> xv = P::load(x + g * P::size);
      simd::unroll<R>([&](auto r) DLNFAST_INLINE { s[g][r] += wv[r] * xv; });
    });
  };
  for (Index i = 0; i < n.whole; ++i, x += k * P::size, w += P::size) {
    simd::unroll<R>([&](auto r)
                        DLNFAST_INLINE { __builtin_prefetch(w + r * w_stride + ahead, 0, 3); });
    add(std::false_type{});
  }
  if (n.rest > 0) add(std::true_type{});
  simd::unroll<Group>([&](auto g) DLNFAST_INLINE {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE { sums[g * R + r] = s[g][r]; });
  });
}

template <class T, int R>
void dots(const T* x, Index k, const T* w, Index w_stride, Stretch n, Vector<T>* sums) {
  // Groups of nearly equal size: 10 rows are 5 + 5, not 6 + 4.
  const Index n_groups = (k + group_limit<T> - 1) / group_limit<T>;
  for (Index group = 0; group < n_groups; ++group) {
    const Index begin = k * group / n_groups;
    const Index size = k * (group + 1) / n_groups - begin;
    const T* xg = x + begin * lanes<T>;
    Vector<T>* sg = sums + begin * R;
    switch (size) {
      case 1: dots_kernel<T, R, 1>(xg, k, w, w_stride, n, sg); break;
      case 2: dots_kernel<T, R, 2>(xg, k, w, w_stride, n, sg); break;
      case 3: dots_kernel<T, R, 3>(xg, k, w, w_stride, n, sg); break;
      case 4: dots_kernel<T, R, 4>(xg, k, w, w_stride, n, sg); break;
      case 5: dots_kernel<T, R, 5>(xg, k, w, w_stride, n, sg); break;
      default: dots_kernel<T, R, 6>(xg, k, w, w_stride, n, sg); break;
    }
  }
}

// Descends R rows along a stretch, C vectors at a time: the gradient is sum_g left[g][r] right[g].
template <class T, int R, int C, bool Momentum, bool Part>
DLNFAST_INLINE inline void descend_vectors(const T* left, const T* right, Index k,
                                           const Rows<T>& rows, int rest, const StepRule<T>& rule) {
  using P = simd::Pack<T>;
  Vector<T> gradient[R][C] = {};
  const Index next = k * P::size;  // the panel of the next vector
  for (Index g = 0; g < k; ++g, left += P::size, right += P::size) {
    Vector<T> x[C];
    simd::unroll<C>([&](auto c) DLNFAST_INLINE { x[c] = P::load(right + c * next); });
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      simd::unroll<C>([&](auto c) DLNFAST_INLINE { gradient[r][c] += x[c] * left[r]; });
    });
  }
  simd::unroll<R>([&](auto r) DLNFAST_INLINE {
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      T* w = rows.w + r * rows.w_stride + c * P::size;
      T* v = Momentum ? rows.v + r * rows.v_stride + c * P::size : nullptr;
      rule.template move<Momentum, Part>(w, v, load<T, Part>(w, rest), gradient[r][c], rest);
    });
  });
}

template <class T, int R, bool Momentum>
void descend_kernel(const T* left, const T* right, Index k, Rows<T> rows, Stretch n,
                    const StepRule<T>& rule) {
  const auto advance = [&](Index vectors) {
    right += vectors * k * lanes<T>;
    rows.w += vectors * lanes<T>;
    if (Momentum) rows.v += vectors * lanes<T>;
  };
  Index i = 0;
  for (; i + 2 <= n.whole; i += 2) {
    descend_vectors<T, R, 2, Momentum, false>(left, right, k, rows, 0, rule);
    advance(2);
  }
  if (i < n.whole) {
    descend_vectors<T, R, 1, Momentum, false>(left, right, k, rows, 0, rule);
    advance(1);
  }
  if (n.rest > 0) descend_vectors<T, R, 1, Momentum, true>(left, right, k, rows, n.rest, rule);
}

// y[g] += sum_r left[g][r] w[r] for C vectors of columns and, where W moves, its descent.
template <class T, int R, int C, bool Moves, bool Momentum, bool Part>
DLNFAST_INLINE inline void sum_vectors(const T* left, const T* right, Index k, const Rows<T>& rows,
                                       int rest, T* y, const StepRule<T>* rule) {
  using P = simd::Pack<T>;
  Vector<T> w[R][C];
  Vector<T> gradient[R][C] = {};
  simd::unroll<R>([&](auto r) DLNFAST_INLINE {
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      const T* p = rows.w + r * rows.w_stride + c * P::size;
      __builtin_prefetch(p + R * rows.w_stride, 0, 2);
      w[r][c] = load<T, Part>(p, rest);
      simd::keep(w[r][c]);
    });
  });
  const Index next = k * P::size;
  for (Index g = 0; g < k; ++g, left += P::size, y += P::size) {
    Vector<T> sum[C], x[C];
    simd::unroll<C>([&](auto c) DLNFAST_INLINE {
      sum[c] = P::load(y + c * next);
      if constexpr (Moves) x[c] = P::load(right + g * P::size + c * next);
    });
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      Vector<T> coefficient = P::broadcast(left[r]);
      simd::keep(coefficient);
      simd::unroll<C>([&](auto c) DLNFAST_INLINE {
        sum[c] += w[r][c] * coefficient;
        if constexpr (Moves) gradient[r][c] += x[c] * coefficient;
      });
    });
    simd::unroll<C>([&](auto c) DLNFAST_INLINE { P::store(y + c * next, sum[c]); });
  }
  if constexpr (Moves) {
    simd::unroll<R>([&](auto r) DLNFAST_INLINE {
      simd::unroll<C>([&](auto c) DLNFAST_INLINE {
        T* to = rows.w + r * rows.w_stride + c * P::size;
        T* v = Momentum ? rows.v + r * rows.v_stride + c * P::size : nullptr;
        rule->template move<Momentum, Part>(to, v, w[r][c], gradient[r][c], rest);
      });
    });
  }
}

template <class T, int R, bool Moves, bool Momentum>
void sums_kernel(const T* left, const T* right, Index k, Rows<T> rows, Stretch n, T* y,
                 const StepRule<T>* rule) {
  constexpr int C = Moves ? 1 : 2;
  const auto advance = [&](Index vectors) {
    if (Moves) right += vectors * k * lanes<T>;
    y += vectors * k * lanes<T>;
    rows.w += vectors * lanes<T>;
    if (Momentum) rows.v += vectors * lanes<T>;
  };
  Index i = 0;
  for (; i + C <= n.whole; i += C) {
    sum_vectors<T, R, C, Moves, Momentum, false>(left, right, k, rows, 0, y, rule);
    advance(C);
  }
  if (i < n.whole) {
    sum_vectors<T, R, 1, Moves, Momentum, false>(left, right, k, rows, 0, y, rule);
    advance(1);
  }
  if (n.rest > 0) {
    sum_vectors<T, R, 1, Moves, Momentum, true>(left, right, k, rows, n.rest, y, rule);
  }
}

// One job: which blocks take part. Absent ones have no data.
template <class T>
struct Pass {
  MatrixRef<const T> left;   // k x m
  MatrixRef<const T> right;  // k x n
  MatrixRef<T> w;            // m x n; written only by a descent
  MatrixRef<T> row_result;   // k x m: right * W^T
  MatrixRef<T> col_result;   // k x n: left * W
  const Descent<T>* descent = nullptr;

  Index k() const { return left.absent() ? right.rows : left.rows; }
  bool has_momentum() const { return descent != nullptr && !descent->velocity.absent(); }
};

// The blocks of a pass in panels.
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
    const MatrixRef<T>& v = p.descent->velocity;
    rows.v = v.row(i) + j;
    rows.v_stride = v.stride;
  }
  return rows;
}

// Where the k coefficients of row i stand, `lanes` apart.
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
  // Of the panels and the tile, as many columns as fit the first-level cache, but enough to make
  // loading and storing the sums cheap.
  constexpr Index bytes = 24 * 1024;
  const Index line = lanes<T> * static_cast<Index>(sizeof(T));
  const Index least = k > 32 ? 48 : 24;
  const Index most = std::max(bytes / ((k + rows_of_dots<T>)*line), least) * lanes<T>;
  const Index n_blocks = (n + most - 1) / most;
  const Index step = padded<T>((n + n_blocks - 1) / n_blocks);
  const StepRule<T> rule(p.descent != nullptr ? *p.descent : Descent<T>{});
  for_tiles<rows_of_dots<T>>(share.begin, share.end, [&](Index i, auto r) {
    constexpr int R = decltype(r)::value;
    Vector<T> sums[thin_limit * R];
    if (!p.row_result.absent()) std::fill(sums, sums + k * R, Vector<T>{});
    for (Index j = 0; j < n; j += step) {
      const Stretch columns = stretch<T>(std::min(step, n - j));
      const Rows<T> rows = rows_from(p, i, j);
      const T* right = panels.right + j * k;
      if (!p.row_result.absent()) {
        dots<T, R>(right, k, rows.w, rows.w_stride, columns, sums);
      }
      if (p.descent == nullptr) continue;
      const T* left = coefficients<T>(panels.left, k, i);
      if (p.has_momentum()) {
        descend_kernel<T, R, true>(left, right, k, rows, columns, rule);
      } else {
        descend_kernel<T, R, false>(left, right, k, rows, columns, rule);
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
  const StepRule<T> rule(p.descent != nullptr ? *p.descent : Descent<T>{});
  const T* right = p.descent != nullptr ? panels.right + share.begin * k : nullptr;
  for_tiles<rows_of_sums<T>>(0, p.w.rows, [&](Index i, auto r) {
    constexpr int R = decltype(r)::value;
    const Rows<T> rows = rows_from(p, i, share.begin);
    const T* left = coefficients<T>(panels.left, k, i);
    if (p.descent == nullptr) {
      sums_kernel<T, R, false, false>(left, right, k, rows, stretch<T>(n), y, &rule);
    } else if (p.has_momentum()) {
      sums_kernel<T, R, true, true>(left, right, k, rows, stretch<T>(n), y, &rule);
    } else {
      sums_kernel<T, R, true, false>(left, right, k, rows, stretch<T>(n), y, &rule);
    }
  });
  unpack<T>(y, p.col_result.block(0, share.begin, k, n));
}

template <class T>
void run(const Pass<T>& p, const Context& context) {
  const Index m = p.w.rows;
  const Index n = p.w.cols;
  const Index k = p.k();
  if (m == 0 || n == 0 || (k == 0 && p.descent == nullptr)) {
    if (!p.row_result.absent()) p.row_result.map().setZero();
    if (!p.col_result.absent()) p.col_result.map().setZero();
    return;
  }
  context.breathe();

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

  const int n_terms = (p.row_result.absent() ? 0 : 1) + (by_columns ? 1 : 0) + (p.descent ? 1 : 0);
  const double flops =
      2.0 * n_terms * static_cast<double>(k) * static_cast<double>(m) * static_cast<double>(n);
  // Chunks: of columns, so that the result stays in the second-level cache and rows are still read
  // some pages at a time.
  const Index extent = by_columns ? n : m;
  const Index widest = 16384 / std::max<Index>(k, 1) / lanes<T>;
  const Index chunk = by_columns ? std::clamp<Index>(widest, 32, 64) * lanes<T> : 32;
  const Index n_chunks = (extent + chunk - 1) / chunk;
  int team = team_size(context.n_threads, flops, flops_per_thread);
  team = static_cast<int>(std::min<Index>(team, n_chunks));
  parallel_deal(team, n_chunks, [&](Index c) {
    const Share mine{c * chunk, std::min((c + 1) * chunk, extent)};
    if (by_columns) {
      run_columns(p, panels, mine);
    } else {
      run_rows(p, panels, mine);
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
void require_descent(MatrixRef<const T> left, MatrixRef<const T> right, const MatrixRef<T>& w,
                     const Descent<T>& descent) {
  require_thin(left.rows);
  require_shape(left, left.rows, w.rows, "the left block of an update");
  require_shape(right, left.rows, w.cols, "the right block of an update");
  if (!descent.velocity.absent() || descent.momentum != T(0)) {
    require_shape(descent.velocity, w.rows, w.cols, "the velocity");
  }
}

template <class T>
MatrixRef<T> without_const(MatrixRef<const T> w) {
  // A pass without a descent never writes W.
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
                                      MatrixRef<T> w, MatrixRef<T> y, const Descent<T>& descent,
                                      const Context& context) {
  require_descent(left, right, w, descent);
  require_shape(y, right.rows, w.rows, "the result of a thin product");
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.row_result = y;
  p.descent = &descent;
  run(p, context);
}

template <class T>
void thin_times_and_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                            MatrixRef<T> y, const Descent<T>& descent, const Context& context) {
  require_descent(left, right, w, descent);
  require_shape(y, left.rows, w.cols, "the result of a thin product");
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.col_result = y;
  p.descent = &descent;
  run(p, context);
}

template <class T>
void thin_descend(MatrixRef<const T> left, MatrixRef<const T> right, MatrixRef<T> w,
                  const Descent<T>& descent, const Context& context) {
  require_descent(left, right, w, descent);
  Pass<T> p;
  p.left = left;
  p.right = right;
  p.w = w;
  p.descent = &descent;
  run(p, context);
}

#define DLNFAST_INSTANTIATE(T)                                                                     \
  template void thin_times_transpose<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,      \
                                        const Context&);                                           \
  template void thin_times<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,                \
                              const Context&);                                                     \
  template void thin_times_transpose_and_descend<T>(MatrixRef<const T>, MatrixRef<const T>,        \
                                                    MatrixRef<T>, MatrixRef<T>, const Descent<T>&, \
                                                    const Context&);                               \
  template void thin_times_and_descend<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,    \
                                          MatrixRef<T>, const Descent<T>&, const Context&);        \
  template void thin_descend<T>(MatrixRef<const T>, MatrixRef<const T>, MatrixRef<T>,              \
                                const Descent<T>&, const Context&);
DLNFAST_INSTANTIATE(float)
DLNFAST_INSTANTIATE(double)
#undef DLNFAST_INSTANTIATE

}  // namespace dlnfast
