// SPDX-License-Identifier: MIT
#include "small_descent.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "fixed_products.hpp"

// Weights are updated with compensated (Kahan) sums: on a plateau, tens of thousands of tiny steps
// on nearly constant weights would otherwise be rounded in the same direction, and leaving the
// plateau amplifies errors by about 1/eps.
//
// A step has 3 (L - 1) products of 2 n^3 flops and L - 1 transposes.
namespace dlnfast {
namespace {

template <class T, int Size>
class FixedDescent final : public SmallDescent<T>, private FixedProducts<T, Size> {
  using Products = FixedProducts<T, Size>;
  using Products::into;
  using Products::load;
  using Products::multiply;
  using Products::multiply_transpose;
  using Products::store;
  using Products::transpose;
  using Block = typename Products::Block;
  using P = typename Products::P;
  using Vector = typename Products::Vector;
  static constexpr int stride = Products::stride;

 public:
  FixedDescent(Index size, Index n_layers, const Objective<T>& objective, const Rates& rates)
      : Products(size),
        n_layers_(n_layers),
        rates_(rates),
        loss_scale_(objective.loss_scale),
        loss_floor_(objective.loss_floor),
        whitened_(objective.input_gram.absent()),
        has_momentum_(rates.any_momentum()),
        weight_(n_layers),
        compensation_(n_layers),
        velocity_(has_momentum_ ? n_layers : 0),
        product_(n_layers) {
    for (Index l = 0; l < n_layers; ++l) {
      learning_rate_.push_back(static_cast<T>(rates.learning_rate_at(0, l)));
      weight_decay_.push_back(static_cast<T>(rates.weight_decay_at(0, l)));
      momentum_.push_back(static_cast<T>(rates.momentum_at(0, l)));
    }
    load(objective.target, target_);
    if (!whitened_) {
      load(objective.input_gram, gram_);
      load(objective.input_factor, factor_);
      load(objective.factor_target, factor_target_);
    }
  }

  void load_weight(Index layer, const MatrixRef<T>& weight) override {
    load(weight, weight_[layer]);
  }

  void store_weight(Index layer, const MatrixRef<T>& weight) const override {
    store(weight_[layer], weight);
  }

  void load_state(Index layer, const MatrixRef<T>& velocity,
                  const MatrixRef<T>& compensation) override {
    if (has_momentum_ && !velocity.absent()) load(velocity, velocity_[layer]);
    if (!compensation.absent()) load(compensation, compensation_[layer]);
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
      multiply(weight_[l], *chain, into(product_[l]));
      chain = &product_[l];
    }
    Vector sum = {};
    const auto compare = [&](int at, const Vector& product) DLNFAST_INLINE {
      const Vector e = product - P::load(target_.a + at);
      P::store(error_.a + at, e);
      sum += e * e;
    };
    if (!whitened_) {
      multiply(*chain, gram_, [&](int at, const Vector& v) DLNFAST_INLINE {
        P::store(error_.a + at, v - P::load(target_.a + at));
      });
      multiply(*chain, factor_, [&](int at, const Vector& v) DLNFAST_INLINE {
        const Vector r = v - P::load(factor_target_.a + at);
        sum += r * r;
      });
    } else if (last > 0) {
      multiply(weight_[last], *chain, compare);
    } else {
      for (int i = 0; i < stride * stride; i += P::size) compare(i, P::load(chain->a + i));
    }
    return 0.5 * loss_scale_ * static_cast<double>(P::sum(sum)) + loss_floor_;
  }

  bool is_scheduled() const override { return rates_.is_scheduled(); }
  void set_step(Index step) override {
    const auto same = [](std::size_t l) { return l; };
    Rates::read_row(rates_.tables.learning_rate_table, step, learning_rate_, same);
    Rates::read_row(rates_.tables.weight_decay_table, step, weight_decay_, same);
    Rates::read_row(rates_.tables.momentum_table, step, momentum_, same);
  }

  void update() override {
    propagate([&](Index l, const auto& for_gradient)
                  DLNFAST_INLINE { update_layer(l, for_gradient); });
  }

  void compute_gradients(const std::vector<MatrixRef<T>>& gradients) override {
    Block gradient;
    const T scale = static_cast<T>(loss_scale_);
    propagate([&](Index l, const auto& for_gradient) DLNFAST_INLINE {
      for_gradient([&](int at, const Vector& v)
                       DLNFAST_INLINE { P::store(gradient.a + at, v * scale); });
      store(gradient, gradients[static_cast<std::size_t>(l)]);
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
  // Propagates the error of the last `evaluate` backwards. Calls visit(l, for_gradient) for every
  // layer; for_gradient calls a function for every vector of the gradient divided by the loss scale.
  template <class Visit>
  DLNFAST_INLINE void propagate(const Visit& visit) {
    const Products& products = *this;  // GCC 12 cannot capture `this` below
    Block transposed, layer_errors[2];
    const Block* error = &error_;
    for (Index l = n_layers_ - 1; l > 0; --l) {
      Block& next = layer_errors[l % 2];
      multiply_transpose(weight_[l], *error, into(next));
      transpose(l == 1 ? weight_[0] : product_[l - 1], transposed);
      visit(l, [&](auto step) DLNFAST_INLINE { products.multiply(*error, transposed, step); });
      error = &next;
    }
    visit(0, [&](auto step) DLNFAST_INLINE {
      for (int i = 0; i < stride * stride; i += P::size) step(i, P::load(error->a + i));
    });
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

  Index n_layers_;
  Rates rates_;
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
