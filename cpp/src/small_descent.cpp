// SPDX-License-Identifier: MIT
#include "small_descent.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "dlnfast/simd.hpp"

// Weights are updated with compensated (Kahan) sums: on a plateau, tens of thousands of tiny steps
// on nearly constant weights would otherwise be rounded in the same direction, and leaving the
// plateau amplifies errors by about 1/eps.
//
// A step has 3 (L - 1) products of 2 n^3 flops and L - 1 transposes. The operation after a product
// (error and loss, or the update of a weight) reads the sums directly from registers.
namespace dlnfast {
namespace {

constexpr int bytes_for(int needed) {
  int bytes = 16;
  while (bytes < needed && bytes < simd::vector_bytes) bytes *= 2;
  return bytes;
}

template <class T, int Size>
class FixedDescent final : public SmallDescent<T> {
  using P = simd::Pack<T, bytes_for(Size* static_cast<int>(sizeof(T)))>;
  using Vector = typename P::Vector;
  static constexpr int n_vectors = (Size + P::size - 1) / P::size;
  static constexpr int stride = n_vectors * P::size;

  // For sizes below this, the number of units is the constant `Size`, padding included. From this
  // size on it is a runtime value: the padded units are skipped, except for one if the number is
  // odd.
  static constexpr int runtime_size = 16;
  static_assert(Size % 2 == 0);

  // A tile of a product: as many sums as the registers hold together with the operands, in a
  // divisor of the columns.
  static constexpr int sums_limit = simd::n_registers == 32 ? 24 : 10;
  static constexpr int tile_vectors() {
    int best = 1;
    for (int n = 1; n <= std::min(n_vectors, 5); ++n) {
      if (n_vectors % n == 0) best = n;
    }
    return best;
  }
  static constexpr int tile_rows() {
    const int limit = sums_limit / tile_vectors();
    if (Size >= runtime_size) return std::min(limit / 2 * 2, 8);
    int best = 1;
    for (int rows = 1; rows <= std::min(Size, limit); ++rows) {
      if (Size % rows == 0) best = rows;
    }
    return best;
  }

  struct alignas(64) Block {
    T a[stride * stride] = {};
  };

 public:
  FixedDescent(Index size, Index n_layers, const Objective<T>& objective, const Rates& rates)
      : size_(static_cast<int>(size + size % 2)),
        n_layers_(n_layers),
        loss_scale_(objective.loss_scale),
        loss_floor_(objective.loss_floor),
        whitened_(objective.input_gram.absent()),
        has_momentum_(rates.any_momentum()),
        weight_(n_layers),
        compensation_(n_layers),
        velocity_(has_momentum_ ? n_layers : 0),
        product_(n_layers) {
    for (Index l = 0; l < n_layers; ++l) {
      learning_rate_.push_back(static_cast<T>(rates.learning_rate[l]));
      weight_decay_.push_back(static_cast<T>(rates.weight_decay[l]));
      momentum_.push_back(static_cast<T>(rates.momentum[l]));
    }
    load(objective.target, target_);
    if (!whitened_) {
      load(objective.input_gram, gram_);
      load(objective.input_factor, factor_);
      load(objective.factor_target, factor_target_);
    }
  }

  void load_weight(Index layer, const MatrixRef<T>& weight) override {
    load<const T>(weight, weight_[layer]);
  }

  void store_weight(Index layer, const MatrixRef<T>& weight) const override {
    store(weight_[layer], weight);
  }

  void load_state(Index layer, const MatrixRef<T>& velocity,
                  const MatrixRef<T>& compensation) override {
    if (has_momentum_ && !velocity.absent()) load<const T>(velocity, velocity_[layer]);
    if (!compensation.absent()) load<const T>(compensation, compensation_[layer]);
  }

  void store_state(Index layer, const MatrixRef<T>& velocity,
                   const MatrixRef<T>& compensation) const override {
    if (has_momentum_ && !velocity.absent()) store(velocity_[layer], velocity);
    if (!compensation.absent()) store(compensation_[layer], compensation);
  }

  double evaluate() override {
    const Index last = n_layers_ - 1;
    const Block* chain = &weight_[0];
    for (Index l = 1; l < (whitened_ ? last : n_layers_); ++l) {
      multiply<false>(weight_[l], *chain, into(product_[l]));
      chain = &product_[l];
    }
    Vector sum = {};
    const auto compare = [&](int at, const Vector& product) DLNFAST_INLINE {
      const Vector e = product - P::load(target_.a + at);
      P::store(error_.a + at, e);
      sum += e * e;
    };
    if (!whitened_) {
      multiply<false>(*chain, gram_, [&](int at, const Vector& v) DLNFAST_INLINE {
        P::store(error_.a + at, v - P::load(target_.a + at));
      });
      multiply<false>(*chain, factor_, [&](int at, const Vector& v) DLNFAST_INLINE {
        const Vector r = v - P::load(factor_target_.a + at);
        sum += r * r;
      });
    } else if (last > 0) {
      multiply<false>(weight_[last], *chain, compare);
    } else {
      for (int i = 0; i < stride * stride; i += P::size) compare(i, P::load(chain->a + i));
    }
    return 0.5 * loss_scale_ * static_cast<double>(P::sum(sum)) + loss_floor_;
  }

  void update() override {
    Block transposed, layer_errors[2];
    const Block* error = &error_;
    for (Index l = n_layers_ - 1; l > 0; --l) {
      Block& next = layer_errors[l % 2];
      multiply<true>(weight_[l], *error, into(next));
      transpose(l == 1 ? weight_[0] : product_[l - 1], transposed);
      update_layer(l, [&](auto step) DLNFAST_INLINE { multiply<false>(*error, transposed, step); });
      error = &next;
    }
    update_layer(0, [&](auto step) DLNFAST_INLINE {
      for (int i = 0; i < stride * stride; i += P::size) step(i, P::load(error->a + i));
    });
  }

  Index n_layers() const override { return n_layers_; }

  double largest_entry(Index layer) const override {
    return largest_magnitude<T>({weight_[layer].a, stride, stride});
  }

  // About a millisecond, so that reading the clock costs little compared with a million flops.
  Index steps_per_poll() const override {
    const double step_flops = 6.0 * static_cast<double>(n_layers_) * Size * Size * Size;
    return std::clamp<Index>(static_cast<Index>(1e6 / step_flops), 1, 256);
  }

 private:
  int size() const {
    if constexpr (Size < runtime_size) return Size;
    return size_;
  }

  template <class U>
  static void load(const MatrixRef<U>& m, Block& block) {
    block = Block();
    for (Index i = 0; i < m.rows; ++i) std::copy(m.row(i), m.row(i) + m.cols, block.a + i * stride);
  }

  static void store(const Block& block, const MatrixRef<T>& m) {
    for (Index i = 0; i < m.rows; ++i) {
      const T* from = block.a + i * stride;
      std::copy(from, from + m.cols, m.row(i));
    }
  }

  static auto into(Block& c) {
    return [&c](int at, const Vector& v) DLNFAST_INLINE { P::store(c.a + at, v); };
  }

  // Computes A B, or A^T B: calls store(at, v) for every vector of the result.
  template <bool transpose_a, class Store>
  DLNFAST_INLINE void multiply(const Block& a, const Block& b, const Store& store) const {
    constexpr int rows = tile_rows();
    const int n = size();
    int i = 0;
    for (; i + rows <= n; i += rows) multiply_rows<rows, transpose_a>(a, b, n, i, store);
    if constexpr (Size >= runtime_size)
      multiply_last_rows<rows - 2, transpose_a>(a, b, n, i, store);
  }

  // Multiplies the last rows, an even number.
  template <int rows, bool transpose_a, class Store>
  DLNFAST_INLINE static void multiply_last_rows(const Block& a, const Block& b, int n, int i,
                                                const Store& store) {
    if constexpr (rows > 0) {
      if (n - i == rows) return multiply_rows<rows, transpose_a>(a, b, n, i, store);
      multiply_last_rows<rows - 2, transpose_a>(a, b, n, i, store);
    }
  }

  template <int rows, bool transpose_a, class Store>
  DLNFAST_INLINE static void multiply_rows(const Block& a, const Block& b, int n, int i,
                                           const Store& store) {
    constexpr int vectors = tile_vectors();
    for (int first = 0; first < n_vectors; first += vectors) {
      const T* bk = b.a + first * P::size;
      Vector sums[rows][vectors] = {};
      for (int k = 0; k < n; ++k, bk += stride) {
        Vector bv[vectors];
        DLNFAST_UNROLL
        for (int v = 0; v < vectors; ++v) {
          bv[v] = P::load(bk + v * P::size);
          if constexpr (vectors > 1) simd::hold_in_register(bv[v]);
        }
        DLNFAST_UNROLL
        for (int r = 0; r < rows; ++r) {
          const T coefficient = transpose_a ? a.a[k * stride + i + r] : a.a[(i + r) * stride + k];
          DLNFAST_UNROLL
          for (int v = 0; v < vectors; ++v) sums[r][v] += bv[v] * coefficient;
        }
      }
      DLNFAST_UNROLL
      for (int r = 0; r < rows; ++r) {
        DLNFAST_UNROLL
        for (int v = 0; v < vectors; ++v) {
          store((i + r) * stride + (first + v) * P::size, sums[r][v]);
        }
      }
    }
  }

  void transpose(const Block& a, Block& b) const {
    for (int i = 0; i < size(); i += P::size) {
      for (int j = 0; j < size(); j += P::size) {
        Vector v[P::size];
        DLNFAST_UNROLL
        for (int r = 0; r < P::size; ++r) v[r] = P::load(a.a + (i + r) * stride + j);
        simd::transpose<P>(v);
        DLNFAST_UNROLL
        for (int r = 0; r < P::size; ++r) P::store(b.a + (j + r) * stride + i, v[r]);
      }
    }
  }

  // Updates a layer: `for_gradient` calls the function that it receives for every vector of the
  // gradient.
  template <class ForGradient>
  DLNFAST_INLINE void update_layer(Index l, const ForGradient& for_gradient) {
    T* w = weight_[l].a;
    T* compensation = compensation_[l].a;
    const T rate = learning_rate_[l];
    const T decay = weight_decay_[l];
    const T scale = static_cast<T>(loss_scale_);
    if (has_momentum_) {
      T* v = velocity_[l].a;
      const T momentum = momentum_[l];
      for_gradient([&](int at, const Vector& gradient) DLNFAST_INLINE {
        const Vector new_velocity =
            P::load(v + at) * momentum + gradient * scale + P::load(w + at) * decay;
        P::store(v + at, new_velocity);
        add(w + at, compensation + at, -new_velocity * rate);
      });
    } else {
      const T shrink = rate * decay;
      const T step = rate * scale;
      for_gradient([&](int at, const Vector& gradient) DLNFAST_INLINE {
        add(w + at, compensation + at, -gradient * step - P::load(w + at) * shrink);
      });
    }
  }

  // w += change as a Kahan sum: the rounding error is subtracted from the next change.
  DLNFAST_INLINE static void add(T* w, T* compensation, const Vector& change) {
    const Vector old = P::load(w);
    const Vector corrected = change - P::load(compensation);
    const Vector sum = old + corrected;
    P::store(compensation, (sum - old) - corrected);
    P::store(w, sum);
  }

  int size_;
  Index n_layers_;
  double loss_scale_;
  double loss_floor_;
  bool whitened_;
  bool has_momentum_;
  std::vector<Block> weight_, compensation_, velocity_;
  std::vector<Block> product_;  // W_{l+1} .. W_1 from the second layer on
  std::vector<T> learning_rate_, weight_decay_, momentum_;
  Block target_, gram_, factor_, factor_target_, error_;
};

}  // namespace

template <class T>
std::unique_ptr<SmallDescent<T>> small_descent(Index size, Index n_layers,
                                               const Objective<T>& objective, const Rates& rates) {
  std::unique_ptr<SmallDescent<T>> result;
  const auto make_if_fits = [&](auto limit) {
    if (result != nullptr || size > limit) return;
    result = std::make_unique<FixedDescent<T, limit>>(size, n_layers, objective, rates);
  };
  simd::unroll<6>([&](auto i) { make_if_fits(std::integral_constant<int, 2 * (i + 1)>{}); });
  make_if_fits(std::integral_constant<int, 16>{});
  make_if_fits(std::integral_constant<int, 20>{});
  make_if_fits(std::integral_constant<int, 24>{});
  make_if_fits(std::integral_constant<int, small_limit>{});
  return result;
}

template std::unique_ptr<SmallDescent<float>> small_descent<float>(Index, Index,
                                                                   const Objective<float>&,
                                                                   const Rates&);
template std::unique_ptr<SmallDescent<double>> small_descent<double>(Index, Index,
                                                                     const Objective<double>&,
                                                                     const Rates&);

}  // namespace dlnfast
