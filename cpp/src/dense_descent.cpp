// SPDX-License-Identifier: MIT
#include "dlnfast/dense_descent.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "dlnfast/completion.hpp"
#include "dlnfast/linear_operator.hpp"
#include "dlnfast/product.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/thin_product.hpp"
#include "dlnfast/threads.hpp"
#include "dlnfast/workspace.hpp"
#include "small_descent.hpp"
#include "update_rule.hpp"

namespace dlnfast {
namespace {

constexpr double elements_per_thread = 65536;
// Time of a flop with a sparse E, relative to a dense one.
constexpr double sparse_penalty = 4.0;

// The largest singular value of a slowly changing matrix, by power iteration.
template <class T>
class LargestValue {
 public:
  // Starts from `vector` (w.cols), or from a random vector if that is null or zero.
  LargestValue(const MatrixRef<T>& w, const T* vector)
      : w_(w), right_(w.cols), left_(w.rows), start_(w.cols) {
    if (vector != nullptr) std::copy(vector, vector + w.cols, right_.data());
    if (vector != nullptr && right_.any()) return;
    Random random(1);
    random.fill(MatrixRef<T>(right_.data(), 1, w.cols));
  }

  // Stores the vector from which the last update started: a resumed run repeats that update.
  void store(T* vector) const { std::copy(start_.data(), start_.data() + start_.size(), vector); }

  // Runs two iterations from the vector of the last update.
  double update() {
    double value = 0.0;
    start_ = right_;
    for (int sweep = 0; sweep < 2; ++sweep) {
      const T length = right_.norm();
      if (!(length > T(0))) return 0.0;
      right_ /= length;
      left_.noalias() = w_.map() * right_;
      value = static_cast<double>(left_.norm());
      right_.noalias() = w_.map().transpose() * left_;
    }
    return value;
  }

 private:
  using Column = Eigen::Matrix<T, Eigen::Dynamic, 1>;
  MatrixRef<T> w_;
  Column right_, left_, start_;
};

// A weight matrix with the parameters of its gradient step.
template <class T>
struct Layer {
  Index index = 0;
  MatrixRef<T> weight;
  Matrix<T> velocity;  // used if the caller passes none
  GradientStep<T> gradient_step;
  MatrixRef<T> gradient;  // if present, receives G_l instead of a step
  // At some step of the run.
  bool is_trained, has_decay;

  Layer(Index l, MatrixRef<T> w, double loss_scale, const Rates& rates)
      : index(l),
        weight(w),
        is_trained(rates.has_learning_rate(l)),
        has_decay(rates.has_weight_decay(l)) {
    gradient_step.scale = static_cast<T>(loss_scale);
    set_rates(rates, 0);
  }

  void set_rates(const Rates& rates, Index step) {
    gradient_step.learning_rate = static_cast<T>(rates.learning_rate_at(step, index));
    gradient_step.weight_decay = static_cast<T>(rates.weight_decay_at(step, index));
    gradient_step.momentum = static_cast<T>(rates.momentum_at(step, index));
  }

  // Not in the constructor, because layers move in memory while their list grows.
  void bind_velocity(const MatrixRef<T>& external) {
    if (external.absent()) velocity = Matrix<T>::Zero(weight.rows, weight.cols);
    gradient_step.velocity = external.absent() ? MatrixRef<T>(velocity) : external;
  }

  bool has_momentum() const { return !gradient_step.velocity.absent(); }
  bool writes_gradient() const { return !gradient.absent(); }
  bool needs_gradient() const { return writes_gradient() || is_trained; }
};

template <class Body>
void for_rows(Index rows, Index cols, const Context& context, const Body& body) {
  int team = team_size(context.n_threads, static_cast<double>(rows) * static_cast<double>(cols),
                       elements_per_thread);
  team = static_cast<int>(std::min<Index>(team, std::max<Index>(rows, 1)));
  parallel(team, [&](int member, int size) {
    const Share range = share(rows, 1, member, size);
    for (Index i = range.begin; i < range.end; ++i) body(i);
  });
}

// Updates row i of W along scale * gradient, a row expression, or writes that row of G.
template <class T, class GradientRow>
void descend_row(Layer<T>& layer, Index i, const GradientRow& gradient) {
  const GradientStep<T>& d = layer.gradient_step;
  if (layer.writes_gradient()) {
    layer.gradient.map().row(i) = (d.scale * gradient).matrix();
    return;
  }
  auto w = layer.weight.map().row(i).array();
  if (layer.has_momentum()) {
    auto v = d.velocity.map().row(i).array();
    v = d.momentum * v + d.scale * gradient + d.weight_decay * w;
    w -= d.learning_rate * v;
  } else {
    const T weight_factor = d.weight_factor();
    w = weight_factor * w - (weight_factor * (d.learning_rate * d.weight_decay) * w +
                             (d.learning_rate * d.scale) * gradient);
  }
}

// Updates W along scale * A^T B, formed by a matrix product, or writes G = scale * A^T B. Uses
// `scratch` for weight decay without momentum.
template <class T>
void descend_product(Layer<T>& layer, MatrixRef<const T> a, MatrixRef<const T> b, T* scratch,
                     const Context& context) {
  const GradientStep<T>& d = layer.gradient_step;
  const MatrixRef<T>& weight = layer.weight;
  if (layer.writes_gradient()) {
    multiply<T>(d.scale, a, Op::transpose, b, Op::none, T(0), layer.gradient, context);
  } else if (layer.has_momentum()) {
    multiply<T>(d.scale, a, Op::transpose, b, Op::none, d.momentum, d.velocity, context);
    for_rows(weight.rows, weight.cols, context, [&](Index i) {
      auto w = weight.map().row(i);
      auto v = d.velocity.map().row(i);
      v += d.weight_decay * w;
      w -= d.learning_rate * v;
    });
  } else if (d.weight_decay != T(0)) {
    const MatrixRef<T> gradient(scratch, weight.rows, weight.cols);
    multiply<T>(d.scale, a, Op::transpose, b, Op::none, T(0), gradient, context);
    const T weight_factor = d.weight_factor();
    for_rows(weight.rows, weight.cols, context, [&](Index i) {
      auto w = weight.map().row(i);
      w = weight_factor * w -
          d.learning_rate * (gradient.map().row(i) + weight_factor * d.weight_decay * w);
    });
  } else {
    multiply<T>(-d.learning_rate * d.scale, a, Op::transpose, b, Op::none, T(1), weight, context);
  }
}

// The layers on one side of the pivot, from the pivot outwards, such that the chain is a product of
// A_1 ... A_n with the k = d_p rows of A_1 at the pivot: A = W below the pivot, A = W^T above it.
// All blocks have k rows.
template <class T>
class Side {
 public:
  Side(std::vector<Layer<T>*> outwards, bool transposed)
      : layers_(std::move(outwards)), transposed_(transposed) {
    if (layers_.empty()) return;
    k_ = inner(0);
    thin_ = k_ <= thin_limit;
    Index widest = 0;
    Index largest = 0;
    for (Index i = 0; i < size(); ++i) {
      const Layer<T>& layer = *layers_[i];
      const bool needs_scratch = !layer.has_momentum() && layer.has_decay;
      if (i > 0 && !thin_ && needs_scratch) {
        largest = std::max(largest, layer.weight.rows * layer.weight.cols);
      }
      const bool is_alias = i == 0 && !transposed_;
      products_.emplace_back(is_alias ? 0 : k_, is_alias ? 0 : outer(i));
      widest = std::max(widest, outer(i));
    }
    while (innermost_needed_ < size() && !layers_[innermost_needed_]->needs_gradient()) {
      ++innermost_needed_;
    }
    scratch_.resize(1, largest);
    if (size() > 1) {
      error_[0].resize(1, k_ * widest);
      error_[1].resize(1, k_ * widest);
    }
  }

  bool empty() const { return layers_.empty(); }
  bool needs_error() const { return innermost_needed_ < size(); }
  Index outer_width() const { return outer(size() - 1); }

  // Whether the updates of a layer are thin. The gradient of the innermost layer is one of the
  // blocks itself.
  bool is_thin(Index layer) const {
    for (Index i = 1; i < size(); ++i) {
      if (layers_[i]->index == layer) return thin_;
    }
    return false;
  }
  void set_update_listener(UpdateListener<T>* listener) { listener_ = listener; }

  // Returns A_1 ... A_n, k x outer_width().
  MatrixRef<const T> product() const { return prefix(size() - 1); }

  void forward(const Context& context) {
    if (transposed_) products_[0] = layers_[0]->weight.map().transpose();
    for (Index i = 1; i < size(); ++i) {
      const MatrixRef<const T> x = prefix(i - 1);
      const MatrixRef<const T> w = layers_[i]->weight;
      MatrixRef<T> y(products_[i]);
      if (!thin_) {
        multiply<T>(x, Op::none, w, transposed_ ? Op::transpose : Op::none, y, context);
      } else if (transposed_) {
        thin_times_transpose<T>(x, w, y, context);
      } else {
        thin_times<T>(x, w, y, context);
      }
    }
  }

  // Takes the step, or writes the gradients, from the k x outer_width() error at the outer end.
  void backward(MatrixRef<const T> error, const Context& context) {
    for (Index i = size() - 1; i > 0; --i) {
      if (i < innermost_needed_) return;
      const Index half = i % 2;
      MatrixRef<T> next(error_[half].data(), k_, inner(i));
      if (layers_[i]->needs_gradient()) {
        step(*layers_[i], prefix(i - 1), error, next, context);
      } else {
        pass_inwards(layers_[i]->weight, error, next, context);
      }
      error = next;
    }
    Layer<T>& innermost = *layers_[0];
    if (!innermost.needs_gradient()) return;
    const auto e = error.map();
    for_rows(innermost.weight.rows, innermost.weight.cols, context, [&](Index r) {
      if (transposed_) {
        descend_row(innermost, r, e.col(r).transpose().array());
      } else {
        descend_row(innermost, r, e.row(r).array());
      }
    });
  }

 private:
  Index size() const { return static_cast<Index>(layers_.size()); }
  Index inner(Index i) const {
    return transposed_ ? layers_[i]->weight.cols : layers_[i]->weight.rows;
  }
  Index outer(Index i) const {
    return transposed_ ? layers_[i]->weight.rows : layers_[i]->weight.cols;
  }

  MatrixRef<const T> prefix(Index i) const {
    if (i == 0 && !transposed_) return layers_[0]->weight;
    return {products_[i].data(), products_[i].rows(), products_[i].cols()};
  }

  // Propagates the error one layer inwards.
  void pass_inwards(MatrixRef<const T> w, MatrixRef<const T> error, MatrixRef<T> next,
                    const Context& context) {
    if (transposed_) {
      block_times<T>(error, w, next, context);
    } else {
      block_times_transpose<T>(error, w, next, context);
    }
  }

  // The same, then updates that layer or writes its gradient.
  void step(Layer<T>& layer, MatrixRef<const T> prefix, MatrixRef<const T> error, MatrixRef<T> next,
            const Context& context) {
    const MatrixRef<const T> w = layer.weight;
    if (!thin_ || layer.writes_gradient()) {
      pass_inwards(w, error, next, context);
      if (transposed_) {
        descend_product<T>(layer, error, prefix, scratch_.data(), context);
      } else {
        descend_product<T>(layer, prefix, error, scratch_.data(), context);
      }
      return;
    }
    if (listener_ != nullptr) {
      const auto [left, right] = transposed_ ? std::pair(error, prefix) : std::pair(prefix, error);
      listener_->on_thin_update(layer.index, left, right, layer.gradient_step, context);
    }
    if (transposed_) {
      thin_times_and_descend<T>(error, prefix, layer.weight, next, layer.gradient_step, context);
    } else {
      thin_times_transpose_and_descend<T>(prefix, error, layer.weight, next, layer.gradient_step,
                                          context);
    }
  }

  std::vector<Layer<T>*> layers_;
  bool transposed_;
  bool thin_ = false;
  UpdateListener<T>* listener_ = nullptr;
  Index k_ = 0;
  Index innermost_needed_ = 0;       // layers further inside need no gradient
  std::vector<Matrix<T>> products_;  // A_1 ... A_{i+1}; the first may be the weight itself
  Matrix<T> error_[2];
  Matrix<T> scratch_;  // a gradient, if a product cannot be subtracted in place
};

// Returns the entries of the first l layers, for l = 0 .. L.
std::vector<double> sum_entries(const std::vector<Index>& widths) {
  std::vector<double> sums(1, 0.0);
  for (std::size_t l = 1; l < widths.size(); ++l) {
    sums.push_back(sums.back() +
                   static_cast<double>(widths[l]) * static_cast<double>(widths[l - 1]));
  }
  return sums;
}

// As step_flops, with `entries` of `sum_entries`.
double pivot_flops(const std::vector<Index>& widths, const std::vector<double>& entries,
                   Index pivot, double end_product_entries) {
  const Index n_layers = static_cast<Index>(widths.size()) - 1;
  const auto d = [&](Index i) { return static_cast<double>(widths[i]); };
  // The layers beside the pivot have no product of their own.
  double elements = entries[std::max<Index>(pivot - 1, 0)] + entries[n_layers] -
                    entries[std::min(pivot + 1, n_layers)];
  if (pivot > 0 && pivot < n_layers)
    elements += end_product_entries < 0.0 ? d(n_layers) * d(0) : end_product_entries;
  return 6.0 * d(pivot) * elements;
}

}  // namespace

double step_flops(const std::vector<Index>& widths, Index pivot, double end_product_entries) {
  const Index n_layers = static_cast<Index>(widths.size()) - 1;
  if (n_layers < 1) throw ShapeError("widths has fewer than two entries");
  if (pivot < 0 || pivot > n_layers) {
    throw ShapeError("the pivot is " + std::to_string(pivot) + "; wanted 0 to " +
                     std::to_string(n_layers));
  }
  return pivot_flops(widths, sum_entries(widths), pivot, end_product_entries);
}

Index best_pivot(const std::vector<Index>& widths, double end_product_entries) {
  const Index n_layers = static_cast<Index>(widths.size()) - 1;
  Index best = n_layers;
  double least_flops = step_flops(widths, best, end_product_entries);
  const std::vector<double> entries = sum_entries(widths);
  for (Index p = n_layers - 1; p >= 0; --p) {
    const double flops = pivot_flops(widths, entries, p, end_product_entries);
    // Prefer the smaller width for equal flops, because thin products and updates are fused.
    if (flops < least_flops || (flops == least_flops && widths[p] < widths[best])) {
      best = p;
      least_flops = flops;
    }
  }
  return best;
}

template <class T>
class DenseDescent<T>::Impl {
 public:
  Impl(const std::vector<MatrixRef<T>>& weights, const Objective<T>& objective, const Rates& rates,
       const Context& context, Index small, const OptimizerState<T>& state, FamilyScalars* scalars,
       std::vector<MatrixRef<T>> gradients = {})
      : weights_(weights), state_(state), rates_(rates), objective_(objective), context_(context) {
    context_.workspace = &workspace_;
    const std::vector<Index> widths = checked_widths(weights, objective, rates);
    check_state(state, weights);
    const bool is_adaptive = rates.adaptive.safety > 0.0;
    const bool writes_gradients = !gradients.empty();
    Rates step_rates = rates;
    if (rates.optimizer) {
      if (is_adaptive) throw std::invalid_argument("adaptive rates are for gradient descent only");
      rule_ = std::make_unique<UpdateRule<T>>(weights, rates, state, scalars);
      gradients = rule_->gradients();
      step_rates = rates.for_gradients();
    }
    if (!writes_gradients && objective.has_target() && !is_adaptive &&
        better_small(widths, small)) {
      const Index n = static_cast<Index>(weights.size());
      small_ = small_descent<T>(*std::max_element(widths.begin(), widths.end()), n, objective,
                                step_rates);
      load_weights();
      if (!rule_) small_->load_state(state_);
      return;
    }
    chooses_team_ = context.n_threads == 0;
    const Index n_layers = static_cast<Index>(weights.size());
    if (is_adaptive) {
      largest_.resize(weights.size());
      for (std::size_t l = 0; l < weights.size(); ++l) {
        largest_value_.emplace_back(
            weights[l], state.power_vectors.empty() ? nullptr : state.power_vectors[l].data);
      }
    }
    layers_.reserve(weights.size());
    for (Index l = 0; l < n_layers; ++l) {
      layers_.emplace_back(l, weights[l], objective.loss_scale, step_rates);
      if (step_rates.has_momentum(l))
        layers_.back().bind_velocity(state.velocity.empty() ? MatrixRef<T>() : state.velocity[l]);
      if (!gradients.empty()) layers_.back().gradient = gradients[l];
    }
    const Index d_out = widths.back();
    const Index d_in = widths.front();
    double end_product_entries = static_cast<double>(d_out) * static_cast<double>(d_in);
    if (objective.observed) {
      const double sparse = sparse_penalty * static_cast<double>(objective.observed->by_rows.size);
      sparse_ = sparse < end_product_entries;
      end_product_entries = std::min(end_product_entries, sparse);
    }
    const Index pivot = best_pivot(widths, end_product_entries);
    sparse_ = sparse_ && pivot > 0 && pivot < n_layers;
    std::vector<Layer<T>*> below, above;
    for (Index l = pivot - 1; l >= 0; --l) below.push_back(&layers_[l]);
    for (Index l = pivot; l < n_layers; ++l) above.push_back(&layers_[l]);
    lower_ = std::make_unique<Side<T>>(below, false);
    upper_ = std::make_unique<Side<T>>(above, true);

    if (!sparse_) {
      error_.resize(d_out, d_in);
      residual_.resize(d_out, objective.input_factor.cols);
      row_loss_.resize(d_out);
    }
    if (!below.empty() && !above.empty()) {
      if (!sparse_) chain_.resize(d_out, d_in);
      lower_error_.resize(widths[pivot], d_in);
      upper_error_.resize(widths[pivot], d_out);
    } else if (below.empty()) {
      chain_.resize(d_out, d_in);
      upper_error_.resize(d_in, d_out);
    }
  }

  ~Impl() { write_back(); }

  double evaluate() {
    if (small_) return small_->evaluate();
    if (!chooses_team_) return evaluate_and_adapt();
    context_.n_threads = -choice_.size();
    const auto start = Clock::now();
    const double loss = evaluate_and_adapt();
    step_time_ = Clock::now() - start;
    return loss;
  }

  bool is_scheduled() const { return rates_.is_scheduled(); }
  void set_step(Index step) {
    if (rule_) {
      rule_->set_step(step);
    } else if (small_) {
      small_->set_step(step);
    } else {
      for (Layer<T>& layer : layers_) layer.set_rates(rates_, step);
    }
  }

  void update() {
    if (small_ && rule_) {
      small_->compute_gradients(rule_->gradients());
      rule_->update(context_);
      load_weights();
    } else if (small_) {
      small_->update();
      is_stale_ = true;
    } else if (!chooses_team_) {
      update_weights();
    } else {
      const auto start = Clock::now();
      update_weights();
      step_time_ += Clock::now() - start;
      choice_.record_time(step_time_.count());
    }
  }

  Index n_layers() const { return static_cast<Index>(weights_.size()); }
  double largest_entry(Index layer) const {
    if (small_) return small_->largest_entry(layer);
    return largest_magnitude<T>(weights_[layer]);
  }
  double rate() const { return rate_; }
  Index steps_per_poll() const { return small_ ? small_->steps_per_poll() : 1; }

  const std::vector<MatrixRef<T>>& weights() {
    write_back();
    return weights_;
  }

  void store() {
    write_back();
    if (small_ && !rule_) small_->store_state(state_);
    if (state_.power_vectors.empty()) return;
    for (std::size_t l = 0; l < largest_value_.size(); ++l)
      largest_value_[l].store(state_.power_vectors[l].data);
  }

  bool is_thin(Index layer) const {
    return !small_ && !rule_ && (lower_->is_thin(layer) || upper_->is_thin(layer));
  }
  void set_update_listener(UpdateListener<T>* listener) {
    if (small_) return;
    lower_->set_update_listener(listener);
    upper_->set_update_listener(listener);
  }

 private:
  using Clock = std::chrono::steady_clock;

  double evaluate_and_adapt() {
    const double loss = evaluate_chain();
    if (!largest_value_.empty()) adapt(loss);
    return loss;
  }

  // Products of the largest singular values of some consecutive layers.
  struct Products {
    double all;
    double all_but_one;  // sum over k of sqrt(m_k) times the product of all but s_k
  };
  Products extended(const Products& layers, std::size_t l) const {
    const double s = largest_[l];
    return {layers.all * s,
            layers.all_but_one * s + layers.all * std::sqrt(rates_.learning_rate[l])};
  }

  // Sets the learning rates of the next step (AdaptiveRate).
  void adapt(double loss) {
    const AdaptiveRate& adaptive = rates_.adaptive;
    const std::size_t n = largest_.size();
    for (std::size_t l = 0; l < n; ++l) largest_[l] = largest_value_[l].update();
    const double c = objective_.loss_scale;
    const double excess = std::max(loss - objective_.loss_floor, 0.0);
    const double error = adaptive.error_scale * std::sqrt(2.0 * excess / c);
    // Of the layers above l: their product, and the sum over k of sqrt(m_k) times the product of all
    // but k. The same for the layers below l while l increases.
    above_.assign(n + 1, {1.0, 0.0});
    for (std::size_t l = n; l-- > 0;) above_[l] = extended(above_[l + 1], l);
    Products below{1.0, 0.0};
    double gauss_newton = 0.0, residual = 0.0, decay = 0.0, largest_momentum = 0.0;
    for (std::size_t l = 0; l < n; ++l) {
      const double m = rates_.learning_rate[l];
      const Products& above = above_[l + 1];
      const double s = below.all * above.all;
      gauss_newton += m * adaptive.curvature[l] * s * s;
      const double row =
          std::sqrt(m) * (below.all * above.all_but_one + below.all_but_one * above.all);
      residual = std::max(residual, row * error);
      below = extended(below, l);
      decay = std::max(decay, m * rates_.weight_decay[l]);
      largest_momentum = std::max(largest_momentum, rates_.momentum[l]);
    }
    const double sharpness = c * (gauss_newton + residual) + decay;
    // With zero sharpness all gradients are zero as well.
    rate_ = sharpness > 0.0 ? (1.0 - largest_momentum) * adaptive.safety / sharpness : 0.0;
    for (std::size_t l = 0; l < n; ++l) {
      layers_[l].gradient_step.learning_rate = static_cast<T>(rates_.learning_rate[l] * rate_);
    }
  }

  double evaluate_chain() {
    if (!lower_->empty()) lower_->forward(context_);
    if (!upper_->empty()) upper_->forward(context_);
    return sparse_ ? sparse_residual() : residual(end_to_end());
  }

  void update_weights() {
    update_layers();
    if (rule_) rule_->update(context_);
  }

  void update_layers() {
    const MatrixRef<const T> e = error_;
    if (upper_->empty()) {
      lower_->backward(e, context_);
      return;
    }
    MatrixRef<T> above(upper_error_);
    if (lower_->empty()) {
      upper_error_ = error_.transpose();
      upper_->backward(above, context_);
      return;
    }
    MatrixRef<T> below(lower_error_);
    if (!sparse_) {
      if (lower_->needs_error()) {
        multiply<T>(upper_->product(), Op::none, e, Op::none, below, context_);
      }
      if (upper_->needs_error()) {
        multiply<T>(lower_->product(), Op::none, e, Op::transpose, above, context_);
      }
    }
    if (lower_->needs_error()) lower_->backward(below, context_);
    if (upper_->needs_error()) upper_->backward(above, context_);
  }

  // Whether padding to squares costs less than the general kernels, each call of which takes as
  // long as about 1e4 flops.
  static bool better_small(const std::vector<Index>& widths, Index limit) {
    const Index size = *std::max_element(widths.begin(), widths.end());
    if (size > std::min(limit, small_limit)) return false;
    const double n_products = 3.0 * static_cast<double>(widths.size() - 2);
    const double padded = n_products * 2.0 * static_cast<double>(size * size * size);
    return padded <= 1.5 * step_flops(widths, best_pivot(widths)) + 1e4 * (n_products + 1.0);
  }

  void load_weights() {
    for (Index l = 0; l < n_layers(); ++l) small_->load_weight(l, weights_[l]);
  }

  void write_back() {
    if (!is_stale_) return;
    for (Index l = 0; l < n_layers(); ++l) small_->store_weight(l, weights_[l]);
    is_stale_ = false;
  }

  static std::vector<Index> checked_widths(const std::vector<MatrixRef<T>>& weights,
                                           const Objective<T>& objective, const Rates& rates) {
    if (weights.empty()) throw ShapeError("weights is empty; wanted at least one layer");
    const Index n_layers = static_cast<Index>(weights.size());
    std::vector<Index> widths{weights[0].cols};
    for (Index l = 0; l < n_layers; ++l) {
      require_shape(weights[l], weights[l].rows, widths.back(),
                    "weights[" + std::to_string(l) + "]");
      widths.push_back(weights[l].rows);
    }
    if (objective.observed && objective.measurements) {
      throw ShapeError("both observed entries and measurements are passed; wanted one of them");
    }
    if (objective.observed) {
      check_entries(*objective.observed);
      require_length(objective.observed->rows(), widths.back(), "the rows of observed");
      require_length(objective.observed->cols(), widths.front(), "the columns of observed");
    } else if (objective.measurements) {
      const MatrixRef<const T>& operators = objective.measurements->operators;
      require_shape(operators, operators.rows, widths.back() * widths.front(), "measurements");
    } else {
      check_statistics(objective, widths.back(), widths.front());
    }
    if (!objective.input_gram.absent() && !objective.has_target()) {
      throw ShapeError("input_gram is passed together with observations of the matrix");
    }
    require_length(static_cast<Index>(rates.learning_rate.size()), n_layers, "learning_rate");
    require_length(static_cast<Index>(rates.weight_decay.size()), n_layers, "weight_decay");
    require_length(static_cast<Index>(rates.momentum.size()), n_layers, "momentum");
    if (rates.adaptive.safety > 0.0) {
      const Index n = static_cast<Index>(rates.adaptive.curvature.size());
      require_length(n, n_layers, "curvature");
    }
    return widths;
  }

  MatrixRef<const T> end_to_end() {
    if (upper_->empty()) return lower_->product();
    MatrixRef<T> m(chain_);
    if (lower_->empty()) {
      chain_ = upper_->product().map().transpose();
    } else {
      multiply<T>(upper_->product(), Op::transpose, lower_->product(), Op::none, m, context_);
    }
    return m;
  }

  double loss_of(double squares) const {
    return 0.5 * objective_.loss_scale * squares + objective_.loss_floor;
  }

  // Computes P_L^T E and E T_1^T as needed, and the loss.
  double sparse_residual() {
    const MatrixRef<T> above = upper_->needs_error() ? MatrixRef<T>(upper_error_) : MatrixRef<T>();
    const MatrixRef<T> below = lower_->needs_error() ? MatrixRef<T>(lower_error_) : MatrixRef<T>();
    return loss_of(residual_products<T>(*objective_.observed, upper_->product(), lower_->product(),
                                        above, below, context_));
  }

  // Computes E = M S - Phi, or its replacement for observations, and the loss. Sums row by row and
  // then over rows in order, so that the result does not depend on the number of threads.
  double residual(MatrixRef<const T> m) {
    if (objective_.observed) {
      return loss_of(masked_residual<T>(objective_.observed->by_rows, m, error_, context_));
    }
    if (objective_.measurements) {
      return loss_of(measured_residual<T>(*objective_.measurements, m, error_, context_));
    }
    const bool whitened = objective_.input_gram.absent();
    if (!whitened) {
      multiply<T>(m, Op::none, objective_.input_gram, Op::none, MatrixRef<T>(error_), context_);
      multiply<T>(m, Op::none, objective_.input_factor, Op::none, MatrixRef<T>(residual_),
                  context_);
    }
    for_rows(error_.rows(), error_.cols(), context_, [&](Index i) {
      auto e = error_.row(i);
      if (whitened) {
        e = m.map().row(i) - objective_.target.map().row(i);
        row_loss_[i] = static_cast<double>(e.squaredNorm());
      } else {
        e -= objective_.target.map().row(i);
        auto r = residual_.row(i);
        r -= objective_.factor_target.map().row(i);
        row_loss_[i] = static_cast<double>(r.squaredNorm());
      }
    });
    double total = 0.0;
    for (const double loss : row_loss_) total += loss;
    return loss_of(total);
  }

  std::vector<MatrixRef<T>> weights_;
  OptimizerState<T> state_;
  std::unique_ptr<SmallDescent<T>> small_;
  std::unique_ptr<UpdateRule<T>> rule_;
  bool is_stale_ = false;  // whether the caller's weights are older than those of small_
  bool chooses_team_ = false;
  Rates rates_;
  std::vector<LargestValue<T>> largest_value_;
  std::vector<double> largest_;
  std::vector<Products> above_;
  double rate_ = 1.0;
  bool sparse_ = false;  // whether E is never formed
  TeamChoice choice_{max_threads()};
  std::chrono::duration<double> step_time_{};
  Objective<T> objective_;
  Workspace workspace_;
  Context context_;
  std::vector<Layer<T>> layers_;
  std::unique_ptr<Side<T>> lower_, upper_;
  Matrix<T> chain_, error_, lower_error_, upper_error_;
  Matrix<T> residual_;  // M F - G, if there is an F
  std::vector<double> row_loss_;
};

template <class T>
DenseDescent<T>::DenseDescent(std::vector<MatrixRef<T>> weights, const Objective<T>& objective,
                              const Rates& rates, const Context& context, Index small,
                              const OptimizerState<T>& state, FamilyScalars* scalars)
    : impl_(std::make_unique<Impl>(weights, objective, rates, context, small, state, scalars)) {}

template <class T>
DenseDescent<T>::~DenseDescent() = default;

template <class T>
double DenseDescent<T>::evaluate() {
  return impl_->evaluate();
}

template <class T>
bool DenseDescent<T>::is_scheduled() const {
  return impl_->is_scheduled();
}

template <class T>
void DenseDescent<T>::set_step(Index step) {
  impl_->set_step(step);
}

template <class T>
void DenseDescent<T>::update() {
  impl_->update();
}

template <class T>
Index DenseDescent<T>::n_layers() const {
  return impl_->n_layers();
}

template <class T>
double DenseDescent<T>::largest_entry(Index layer) const {
  return impl_->largest_entry(layer);
}

template <class T>
double DenseDescent<T>::rate() const {
  return impl_->rate();
}

template <class T>
Index DenseDescent<T>::steps_per_poll() const {
  return impl_->steps_per_poll();
}

template <class T>
void DenseDescent<T>::store() {
  impl_->store();
}

template <class T>
const std::vector<MatrixRef<T>>& DenseDescent<T>::weights() const {
  return impl_->weights();
}

template <class T>
bool DenseDescent<T>::is_thin(Index layer) const {
  return impl_->is_thin(layer);
}

template <class T>
void DenseDescent<T>::set_update_listener(UpdateListener<T>* listener) {
  impl_->set_update_listener(listener);
}

template <class T>
double compute_gradients(const std::vector<MatrixRef<const T>>& weights,
                         const Objective<T>& objective, const std::vector<MatrixRef<T>>& gradients,
                         const Context& context) {
  const std::size_t n_layers = weights.size();
  require_length(static_cast<Index>(gradients.size()), static_cast<Index>(n_layers), "gradients");
  std::vector<MatrixRef<T>> layers;
  for (std::size_t l = 0; l < n_layers; ++l) {
    const MatrixRef<const T>& w = weights[l];
    require_shape(gradients[l], w.rows, w.cols, "gradients[" + std::to_string(l) + "]");
    // A layer whose gradient is written is not modified.
    layers.emplace_back(const_cast<T*>(w.data), w.rows, w.cols, w.stride);
  }
  Rates rates;
  rates.learning_rate = rates.weight_decay = rates.momentum = std::vector<double>(n_layers, 0.0);
  typename DenseDescent<T>::Impl chain(layers, objective, rates, context, 0, {}, nullptr,
                                       gradients);
  const double loss = chain.evaluate();
  chain.update();
  return loss;
}

template class DenseDescent<float>;
template class DenseDescent<double>;
template double compute_gradients(const std::vector<MatrixRef<const float>>&,
                                  const Objective<float>&, const std::vector<MatrixRef<float>>&,
                                  const Context&);
template double compute_gradients(const std::vector<MatrixRef<const double>>&,
                                  const Objective<double>&, const std::vector<MatrixRef<double>>&,
                                  const Context&);

}  // namespace dlnfast
