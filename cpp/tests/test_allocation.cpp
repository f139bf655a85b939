// SPDX-License-Identifier: MIT
// A step allocates nothing after the first one has sized its workspace: neither through operator
// new nor inside Eigen, whose allocation check is compiled in and aborts the program. The exception
// are very narrow products of large matrices, which are left to Eigen: they pack blocks of their
// operands on the heap.
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "aligned_memory.hpp"
#include "check.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/reduced_descent.hpp"

namespace {

bool counting = false;
long n_allocations = 0;

void* allocate(std::size_t size, std::size_t alignment) {
  if (counting) ++n_allocations;
  void* p = check::aligned_memory(size, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, sizeof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { check::aligned_free(p); }
void operator delete(void* p, std::size_t) noexcept { check::aligned_free(p); }
void operator delete(void* p, std::align_val_t) noexcept { check::aligned_free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { check::aligned_free(p); }

namespace {

using namespace dlnfast;
using check::random_matrix;

template <class T>
struct Network {
  std::vector<Matrix<T>> weights;
  std::vector<MatrixRef<T>> refs;
  Matrix<T> target, factor;
  Objective<T> objective;
  Rates rates;
  std::vector<Family> families;

  Network(const std::vector<Index>& widths, bool with_gram, bool momentum) {
    for (std::size_t l = 0; l + 1 < widths.size(); ++l) {
      weights.push_back(random_matrix<T>(widths[l + 1], widths[l], 0.1));
    }
    for (auto& w : weights) refs.emplace_back(w);
    target = random_matrix<T>(widths.back(), widths.front());
    objective.target = target;
    if (with_gram) {
      factor = Matrix<T>::Identity(widths.front(), widths.front());
      objective.input_gram = factor;
      objective.input_factor = factor;
      objective.factor_target = target;
    }
    const std::size_t n = weights.size();
    rates.learning_rate.assign(n, 0.01);
    rates.weight_decay.assign(n, 0.1);
    rates.momentum.assign(n, momentum ? 0.5 : 0.0);
    families.push_back({0, 3.0, 1.0, std::vector<double>(n, 0.5)});
    families.push_back({0, 2.0, 0.0, std::vector<double>(1, 0.5)});
  }
};

void check_steps_allocate_nothing(Stepper& stepper, const char* what, Index size) {
  double loss = stepper.evaluate();
  stepper.update();
  n_allocations = 0;
  counting = true;
  Eigen::internal::set_is_malloc_allowed(false);
  for (int t = 0; t < 3; ++t) {
    loss += stepper.evaluate();
    stepper.update();
  }
  Eigen::internal::set_is_malloc_allowed(true);
  counting = false;
  CHECK(std::isfinite(loss));
  CHECK(n_allocations == 0);
  if (n_allocations > 0) {
    std::fprintf(stderr, "    %ld in %s, size %d\n", n_allocations, what, int(size));
  }
}

template <class T>
void reduced_steps_allocate_nothing() {
  for (Index size = 0; size <= 32; ++size) {
    for (int variant = 0; variant < 4; ++variant) {
      Network<T> n({size, size, size, size}, variant % 2 == 1, variant / 2 == 1);
      ReducedDescent<T> descent(n.refs, n.objective, n.families, n.rates, Context{1, nullptr});
      check_steps_allocate_nothing(descent, "reduced descent", size);
    }
  }
}

Optimizer rule_without_decomposition(Rule rule, Index n_layers) {
  Optimizer optimizer;
  optimizer.rule = rule;
  optimizer.nesterov = true;
  optimizer.direction_scale.assign(static_cast<std::size_t>(n_layers), 1.0);
  return optimizer;
}

template <class T>
void steps_of_other_rules_allocate_nothing() {
  for (const Index size : {1, 2, 6, 7, 20, 32, 33, 50, 100}) {
    for (const Rule rule : {Rule::nesterov, Rule::muon}) {
      Network<T> n({size, size, size, size}, false, true);
      n.rates.optimizer = rule_without_decomposition(rule, 3);
      ReducedDescent<T> reduced(n.refs, n.objective, n.families, n.rates, Context{1, nullptr});
      check_steps_allocate_nothing(reduced, "reduced descent by another rule", size);
      DenseDescent<T> dense(n.refs, n.objective, n.rates, Context{1, nullptr});
      check_steps_allocate_nothing(dense, "dense descent by another rule", size);
    }
  }
}

template <class T>
void dense_steps_allocate_nothing() {
  const std::vector<std::vector<Index>> shapes{
      {3, 3, 3, 3},    {10, 10, 10},    {30, 30, 30, 30},    {50, 50, 50, 50},
      {40, 40, 40, 5}, {5, 40, 40, 40}, {40, 5, 40, 40},     {40, 40, 6, 40},
      {1, 9, 9, 1},    {1, 1},          {100, 100, 100, 3},  {3, 100, 100, 100},
      {7, 5},          {64, 64, 64},    {300, 260, 280, 270}};
  for (const auto& widths : shapes) {
    for (int variant = 0; variant < 4; ++variant) {
      Network<T> n(widths, variant % 2 == 1, variant / 2 == 1);
      DenseDescent<T> descent(n.refs, n.objective, n.rates, Context{1, nullptr});
      check_steps_allocate_nothing(descent, "dense descent", widths[1]);
    }
  }
}

// Every fifth entry of a matrix, or every other one, in both orders.
template <class T>
struct Entries {
  std::vector<std::int64_t> starts[2];
  std::vector<std::int32_t> indices[2];
  std::vector<T> values;
  ObservedEntries<T> all;

  Entries(Index m, Index n, Index every) {
    for (const int order : {0, 1}) {
      const Index rows = order == 0 ? m : n, cols = order == 0 ? n : m;
      starts[order].push_back(0);
      for (Index i = 0; i < rows; ++i) {
        for (Index j = 0; j < cols; ++j) {
          if ((i + j) % every == 0) indices[order].push_back(static_cast<std::int32_t>(j));
        }
        starts[order].push_back(static_cast<std::int64_t>(indices[order].size()));
      }
    }
    values.assign(indices[0].size(), T(0.5));
    const Index size = static_cast<Index>(values.size());
    all.by_rows = {m, n, size, starts[0].data(), indices[0].data(), values.data()};
    all.by_columns = {n, m, size, starts[1].data(), indices[1].data(), values.data()};
  }
};

// Steps with E in sparse form, with E as a dense matrix, and with measurements, for constant and
// adaptive rates; and steps on the full target with adaptive rates.
template <class T>
void observed_steps_allocate_nothing() {
  const std::vector<std::vector<Index>> shapes{
      {10, 10, 10},        {30, 30, 30, 30}, {40, 5, 5, 40},  {40, 20, 20, 40},
      {40, 40, 5, 42, 43}, {40, 40, 5},      {5, 40, 40},     {7, 5},
      {1, 9, 9, 1},        {64, 64, 64},     {90, 70, 90},    {300, 10, 10, 280},
      {300, 33, 33, 280},  {3, 50, 4},       {80, 80, 80, 80}};
  enum Kind { sparse, dense_mask, measured, whole };
  for (const auto& widths : shapes) {
    for (const Kind kind : {sparse, dense_mask, measured, whole}) {
      for (int variant = 0; variant < 4; ++variant) {
        const bool is_adaptive = variant % 2 == 1;
        if (kind == whole && !is_adaptive) continue;  // tested by dense_steps_allocate_nothing
        // Skip narrow products with a large E, which allocate (see the head of this file).
        if (kind != sparse && widths[0] == 300) continue;
        Network<T> n(widths, false, variant / 2 == 1);
        const Index d_out = widths.back(), d_in = widths.front();
        const Entries<T> entries(d_out, d_in, kind == sparse ? 5 : 2);
        const Matrix<T> operators = random_matrix<T>(4, d_out * d_in);
        const std::vector<T> values(4, T(1));
        const Measurements<T> measurements{{operators.data(), operators.rows(), operators.cols()},
                                           values.data()};
        if (kind == sparse || kind == dense_mask) n.objective.observed = entries.all;
        if (kind == measured) n.objective.measurements = measurements;
        if (kind != whole) n.objective.target = {};
        if (variant == 3) n.rates.learning_rate[0] = 0.0;
        if (is_adaptive) n.rates.adaptive = {1.0, std::vector<double>(widths.size() - 1, 1.0), 1.0};
        DenseDescent<T> descent(n.refs, n.objective, n.rates, Context{1, nullptr});
        const char* names[] = {"a sparse step", "a masked step", "a measured step", "a step"};
        check_steps_allocate_nothing(descent, names[kind], widths[1]);
      }
    }
  }
}

// The allocation counter works.
void counter_counts_allocations() {
  counting = true;
  const auto one = std::make_unique<int>(1);
  counting = false;
  CHECK(n_allocations == *one);
}

}  // namespace

int main() {
  counter_counts_allocations();
  reduced_steps_allocate_nothing<double>();
  reduced_steps_allocate_nothing<float>();
  dense_steps_allocate_nothing<double>();
  steps_of_other_rules_allocate_nothing<double>();
  dense_steps_allocate_nothing<float>();
  steps_of_other_rules_allocate_nothing<float>();
  observed_steps_allocate_nothing<double>();
  observed_steps_allocate_nothing<float>();
  return check::result();
}
