// SPDX-License-Identifier: MIT
// Gradient descent of many small square networks at once, one per SIMD lane. Used by
// batch_descent.cpp only.
//
// Entry (i, j) of all runs is stored in one vector, so that products need neither transposes nor
// sums within a vector, and all lanes are used for any size. Weights are updated with compensated
// sums (small_descent.cpp).
//
// Cost of a step of L layers of size n, whitened and without momentum or decay, in vector
// operations for all lanes together:
//   products   3 (L - 1) n^3 multiply-adds: L - 1 forward, L - 1 back, L - 1 gradients
//   loss       n^2 subtractions and n^2 multiply-adds
//   update     L n^2 multiply-adds and 3 L n^2 additions
// For n = 6 and L = 3 that is 1296 + 36 + 108 = 1440 multiply-adds and 360 additions. A core that
// starts one multiply-add of 8 doubles and one addition per cycle needs at least 1440 cycles, 180
// for each run. Memory is not a bottleneck: the 12 matrices of a group, 2304 bytes each, stay in or
// near the first-level cache, and a run writes only 8 bytes of loss per step.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "dlnfast/batch_descent.hpp"
#include "dlnfast/simd.hpp"
#include "numbers.hpp"

namespace dlnfast {

// Polls the monitor once in about a million vector operations.
class Poller {
 public:
  explicit Poller(Monitor& monitor) : monitor_(monitor) {}
  void spend(Index operations) {
    left_ -= operations;
    if (left_ > 0) return;
    left_ = 1000000;
    monitor_.poll();
  }

 private:
  Monitor& monitor_;
  Index left_ = 0;
};

// Features of a batch; kernels skip the computations of absent ones.
struct LaneFeatures {
  bool whitened = true;
  bool decay = false;
  bool momentum = false;
};

// The cores of one group of runs, one run per lane. A lane of zeros stays zero.
template <class T>
class LaneCores {
 public:
  static constexpr int lanes = simd::Pack<T>::size;

  virtual ~LaneCores() = default;
  virtual void load(int lane, const Batch<T>& batch, Index run) = 0;
  virtual void clear(int lane) = 0;
  virtual void store_core(int lane, Index layer, const MatrixRef<T>& core) const = 0;
  // Largest absolute entry of a core, as largest_magnitude.
  virtual double largest_entry(int lane, Index layer) const = 0;
  // Computes the losses of the cores, one per lane, and prepares `update`.
  virtual void evaluate(double* loss, Poller& poller) = 0;
  virtual void update(Poller& poller) = 0;

 protected:
  // Access to one lane of a block of n x n entries. Not per size, because it takes no part in a step.
  DLNFAST_NOINLINE static void set_lane(T* block, Index n, int lane, const MatrixRef<const T>& m) {
    for (Index entry = 0; entry < n * n; ++entry) block[entry * lanes + lane] = T(0);
    for (Index i = 0; i < m.rows; ++i) {
      for (Index j = 0; j < m.cols; ++j) block[(i * n + j) * lanes + lane] = m.row(i)[j];
    }
  }
  DLNFAST_NOINLINE static void get_lane(const T* block, Index n, int lane, const MatrixRef<T>& m) {
    for (Index i = 0; i < m.rows; ++i) {
      for (Index j = 0; j < m.cols; ++j) m.row(i)[j] = block[(i * n + j) * lanes + lane];
    }
  }
  DLNFAST_NOINLINE static double largest_in_lane(const T* block, Index n, int lane) {
    double largest = 0.0;
    for (Index entry = 0; entry < n * n; ++entry) {
      const double x = std::abs(static_cast<double>(block[entry * lanes + lane]));
      if (!std::isfinite(x)) return infinity;
      largest = std::max(largest, x);
    }
    return largest;
  }
};

template <class T, int Size>
class LaneDescent final : public LaneCores<T> {
  using P = simd::Pack<T>;
  using Vector = typename P::Vector;
  using LaneCores<T>::lanes;
  static constexpr int n_entries = Size * Size;

  // Rows and columns of a product that are summed at once (product()): divisors of Size whose sums
  // fit the registers together with the operands, with as few loads per multiplication as possible.
  struct Tile {
    int rows, cols;
  };
  static constexpr Tile best_tile() {
    Tile best{1, 1};
    for (int rows = 1; rows <= Size; ++rows) {
      for (int cols = 1; cols <= Size; ++cols) {
        if (Size % rows != 0 || Size % cols != 0) continue;
        if (rows * cols + std::max(std::min(rows, cols) + 1, 4) >= simd::n_registers) continue;
        if ((rows + cols) * best.rows * best.cols < (best.rows + best.cols) * rows * cols) {
          best = {rows, cols};
        }
      }
    }
    return best;
  }
  static constexpr Tile tile = best_tile();

  struct alignas(64) Block {
    T a[n_entries * lanes] = {};
    T* at(int entry) { return a + entry * lanes; }
    const T* at(int entry) const { return a + entry * lanes; }
  };
  template <class U>
  struct alignas(64) PerLane {
    U a[lanes] = {};
  };
  // Factors of the update of one layer.
  struct LayerState {
    PerLane<T> step, shrink;                  // without momentum: rate times scale, times decay
    PerLane<T> scale, decay, momentum, rate;  // with momentum
  };

 public:
  LaneDescent(Index n_layers, const LaneFeatures& features)
      : n_layers_(n_layers),
        features_(features),
        blocks_(n_layers + 1),
        compensation_(n_layers),
        velocity_(features.momentum ? n_layers : 0),
        prefix_(n_layers),
        state_(n_layers) {
    for (Index l = 0; l < n_layers; ++l) weight_.push_back(&blocks_[l]);
    next_first_weight_ = &blocks_[n_layers];
  }

  void load(int lane, const Batch<T>& batch, Index run) override {
    clear(lane);
    const double scale = *batch.loss_scale.row(run);
    for (Index l = 0; l < n_layers_; ++l) {
      set(*weight_[l], lane, batch.cores[l][run]);
      LayerState& m = state_[l];
      m.scale.a[lane] = static_cast<T>(scale);
      m.rate.a[lane] = static_cast<T>(batch.learning_rate.row(run)[l]);
      m.decay.a[lane] = static_cast<T>(batch.weight_decay.row(run)[l]);
      m.momentum.a[lane] = static_cast<T>(batch.momentum.row(run)[l]);
      m.step.a[lane] = m.rate.a[lane] * m.scale.a[lane];
      m.shrink.a[lane] = m.rate.a[lane] * m.decay.a[lane];
    }
    set(target_, lane, batch.target[run]);
    if (!features_.whitened) {
      set(gram_, lane, batch.input_gram[run]);
      set(factor_, lane, batch.input_factor[run]);
      set(factor_target_, lane, batch.factor_target[run]);
    }
    half_scale_.a[lane] = 0.5 * scale;
    floor_.a[lane] = *batch.loss_floor.row(run);
  }

  void clear(int lane) override {
    for (Block& block : blocks_) set(block, lane, {});
    for (Block& block : compensation_) set(block, lane, {});
    for (Block& block : velocity_) set(block, lane, {});
    for (Block* block : {&target_, &gram_, &factor_, &factor_target_}) set(*block, lane, {});
    for (LayerState& m : state_) {
      for (PerLane<T>* value : {&m.step, &m.shrink, &m.scale, &m.decay, &m.momentum, &m.rate}) {
        value->a[lane] = T(0);
      }
    }
    half_scale_.a[lane] = 0.0;
    floor_.a[lane] = 0.0;
  }

  void store_core(int lane, Index layer, const MatrixRef<T>& core) const override {
    LaneCores<T>::get_lane(weight_[layer]->a, Size, lane, core);
  }

  double largest_entry(int lane, Index layer) const override {
    return LaneCores<T>::largest_in_lane(weight_[layer]->a, Size, lane);
  }

  void evaluate(double* loss, Poller& poller) override {
    for (Index l = 1; l + 1 < n_layers_; ++l) {
      product<false, false>(*weight_[l], prefix(l - 1), store_in(prefix_[l]));
      poller.spend(Size * n_entries);
    }
    poller.spend(2 * Size * n_entries);
    Vector sum;
    if (features_.whitened) {
      const Compare compare{target_.a, error_->a, {}};
      if (n_layers_ == 1) {
        sum = for_each_entry(*weight_[0], compare).total();
      } else {
        sum =
            product<false, false>(*weight_[n_layers_ - 1], prefix(n_layers_ - 2), compare).total();
      }
    } else {
      if (n_layers_ > 1) {
        product<false, false>(*weight_[n_layers_ - 1], prefix(n_layers_ - 2),
                              store_in(prefix_[n_layers_ - 1]));
      }
      const Block& m = prefix(n_layers_ - 1);
      product<false, false>(
          m, gram_,
          [from = target_.a, to = error_->a](int, int entry, const Vector& ms)
              DLNFAST_INLINE { P::store(to + entry * lanes, ms - P::load(from + entry * lanes)); });
      sum = product<false, false>(m, factor_, Measure{factor_target_.a, {}}).total();
      poller.spend(Size * n_entries);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      loss[lane] = half_scale_.a[lane] * static_cast<double>(sum[lane]) + floor_.a[lane];
    }
  }

  void update(Poller& poller) override {
    if (features_.momentum) {
      update_with<Rule::momentum>(poller);
    } else if (features_.decay) {
      update_with<Rule::decay>(poller);
    } else {
      update_with<Rule::plain>(poller);
    }
  }

 private:
  enum class Rule { plain, decay, momentum };

  static void set(Block& block, int lane, const MatrixRef<const T>& m) {
    LaneCores<T>::set_lane(block.a, Size, lane, m);
  }

  // Returns W_{l:1}, layers from 0.
  const Block& prefix(Index l) const { return l == 0 ? *weight_[0] : prefix_[l]; }

  // Calls sink(column of the tile, entry, sum) for every entry of op(A) op(B), and returns the
  // sink.
  //
  // The rows of a tile are summed side by side, but start and finish `stagger` terms apart; each
  // row takes the terms in its own cyclic order. Results are then stored a few at a time while
  // multiplications continue. Storing all rows at once would fill the store queue and stall the
  // multiplications.
  template <bool TransposeA, bool TransposeB, class Sink>
  static Sink product(const Block& a, const Block& b, Sink sink) {
    for (int j = 0; j < Size; j += tile.cols) {
      Vector sums[tile.rows][tile.cols];
      sweep<TransposeA, TransposeB, true, false>(a, b, 0, j, sums, sink);
      for (int i = tile.rows; i < Size; i += tile.rows) {
        sweep<TransposeA, TransposeB, false, false>(a, b, i, j, sums, sink);
      }
      sweep<TransposeA, TransposeB, false, true>(a, b, Size, j, sums, sink);
    }
    return sink;
  }

  // Runs once through all terms k: starts the rows from i on and finishes the rows before them. The
  // first sweep of a column of tiles has no rows to finish, the last one has no rows to start.
  template <bool TransposeA, bool TransposeB, bool first, bool last, class Sink>
  DLNFAST_INLINE static void sweep(const Block& a, const Block& b, int i, int j,
                                   Vector (&sums)[tile.rows][tile.cols], Sink& sink) {
    constexpr int stagger = Size / tile.rows;
    constexpr int rows = tile.rows, cols = tile.cols;
    simd::unroll<rows>([&](auto row_group) DLNFAST_INLINE {
      // Rows up to `row_group` belong to the starting rows, the others to the finishing rows.
      constexpr int from = last ? row_group + 1 : 0;
      constexpr int to = first ? row_group + 1 : rows;
      const auto row = [&](int r) DLNFAST_INLINE { return r <= row_group ? i + r : i + r - rows; };
      if constexpr (!last) {
        DLNFAST_UNROLL
        for (int c = 0; c < cols; ++c) sums[row_group][c] = Vector{};
      }
      if constexpr (from < to) {
        for (int k = row_group * stagger; k < (row_group + 1) * stagger; ++k) {
          Vector ak[rows];
          DLNFAST_UNROLL
          for (int r = from; r < to; ++r) {
            ak[r] = P::load(a.at(TransposeA ? k * Size + row(r) : row(r) * Size + k));
            simd::hold_in_register(ak[r]);
          }
          DLNFAST_UNROLL
          for (int c = 0; c < cols; ++c) {
            Vector bk = P::load(b.at(TransposeB ? (j + c) * Size + k : k * Size + j + c));
            simd::hold_in_register(bk);
            DLNFAST_UNROLL
            for (int r = from; r < to; ++r) sums[r][c] += ak[r] * bk;
          }
        }
      }
      // The row that has completed all terms.
      constexpr int done = (row_group + 1) % rows;
      if constexpr (done <= row_group ? !last : !first) {
        DLNFAST_UNROLL
        for (int c = 0; c < cols; ++c) sink(c, row(done) * Size + j + c, sums[done][c]);
      }
    });
  }

  template <class Sink>
  static Sink for_each_entry(const Block& a, Sink sink) {
    for (int entry = 0; entry < n_entries; ++entry) sink(0, entry, P::load(a.at(entry)));
    return sink;
  }

  static auto store_in(Block& block) {
    return [to = block.a](int, int entry, const Vector& sum)
               DLNFAST_INLINE { P::store(to + entry * lanes, sum); };
  }

  // Stores the error of the product and sums its squares.
  struct Compare {
    const T* target;
    T* error;
    Vector squares[2];

    DLNFAST_INLINE void operator()(int column, int entry, const Vector& m) {
      const Vector e = m - P::load(target + entry * lanes);
      P::store(error + entry * lanes, e);
      squares[column % 2] += e * e;
    }
    Vector total() const { return squares[0] + squares[1]; }
  };

  // Sums the squares of a difference without storing it.
  struct Measure {
    const T* target;
    Vector squares[2];

    DLNFAST_INLINE void operator()(int column, int entry, const Vector& m) {
      const Vector e = m - P::load(target + entry * lanes);
      squares[column % 2] += e * e;
    }
    Vector total() const { return squares[0] + squares[1]; }
  };

  // Returns a sink for gradients that updates the weights of layer l, from `from` to `to`.
  template <Rule rule>
  auto make_update(Index l, const Block& from, Block& to) {
    const LayerState& m = state_[l];
    const T* old_weight = from.a;
    T* weight = to.a;
    T* compensation = compensation_[l].a;
    if constexpr (rule == Rule::momentum) {
      T* velocity = velocity_[l].a;
      const Vector rate = P::load(m.rate.a), momentum = P::load(m.momentum.a);
      const Vector scale = P::load(m.scale.a), decay = P::load(m.decay.a);
      return [=](int, int entry, const Vector& gradient) DLNFAST_INLINE {
        const int at = entry * lanes;
        const Vector old = P::load(old_weight + at);
        const Vector new_velocity =
            P::load(velocity + at) * momentum + gradient * scale + old * decay;
        P::store(velocity + at, new_velocity);
        add(old, -new_velocity * rate, compensation + at, weight + at);
      };
    } else {
      const Vector step = P::load(m.step.a), shrink = P::load(m.shrink.a);
      return [=](int, int entry, const Vector& gradient) DLNFAST_INLINE {
        const int at = entry * lanes;
        const Vector old = P::load(old_weight + at);
        if constexpr (rule == Rule::decay) {
          add(old, -gradient * step - old * shrink, compensation + at, weight + at);
        } else {
          add(old, -gradient * step, compensation + at, weight + at);
        }
      };
    }
  }

  // old + change as a Kahan sum: the rounding error is subtracted from the next change.
  DLNFAST_INLINE static void add(Vector old, const Vector& change, T* compensation, T* weight) {
    simd::hold_in_register(old);
    const Vector corrected = change - P::load(compensation);
    const Vector sum = old + corrected;
    P::store(compensation, (sum - old) - corrected);
    P::store(weight, sum);
  }

  template <Rule rule>
  void update_with(Poller& poller) {
    if (n_layers_ == 1) {
      for_each_entry(*error_, make_update<rule>(0, *weight_[0], *weight_[0]));
      return;
    }
    for (Index l = n_layers_ - 1; l > 1; --l) {
      product<true, false>(*weight_[l], *error_, store_in(*next_error_));
      product<false, true>(*error_, prefix(l - 1), make_update<rule>(l, *weight_[l], *weight_[l]));
      std::swap(error_, next_error_);
      poller.spend(2 * Size * n_entries);
    }
    // The gradient of layer 2 needs the old weights of layer 1.
    product<true, false>(*weight_[1], *error_,
                         make_update<rule>(0, *weight_[0], *next_first_weight_));
    product<false, true>(*error_, *weight_[0], make_update<rule>(1, *weight_[1], *weight_[1]));
    std::swap(weight_[0], next_first_weight_);
  }

  Index n_layers_;
  LaneFeatures features_;
  std::vector<Block> blocks_;
  std::vector<Block*> weight_;
  Block* next_first_weight_;
  std::vector<Block> compensation_, velocity_, prefix_;
  std::vector<LayerState> state_;
  Block errors_[2];
  Block* error_ = &errors_[0];
  Block* next_error_ = &errors_[1];
  Block target_, gram_, factor_, factor_target_;
  PerLane<double> half_scale_, floor_;
};

}  // namespace dlnfast
