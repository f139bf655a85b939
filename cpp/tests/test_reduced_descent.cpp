// SPDX-License-Identifier: MIT
#include "dlnfast/reduced_descent.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "check.hpp"
#include "dlnfast/dense_descent.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/recorders.hpp"

using namespace dlnfast;
using check::distance;
using check::random_matrix;
using check::random_orthonormal;

namespace {

template <class T>
std::vector<MatrixRef<T>> refs(std::vector<Matrix<T>>& list) {
  std::vector<MatrixRef<T>> r;
  for (auto& m : list) r.emplace_back(m);
  return r;
}

template <class T>
Matrix<T> core(const ReducedDescent<T>& descent, Index layer, Index rows, Index cols) {
  Matrix<T> out(rows, cols);
  descent.copy_core(layer, out.data());
  return out;
}

Rates some_rates(Index n_layers, bool momentum) {
  Rates rates;
  for (Index l = 0; l < n_layers; ++l) {
    rates.learning_rate.push_back(0.02 + 0.005 * double(l));
    rates.weight_decay.push_back(l == 1 ? 0.0 : 0.05);
    rates.momentum.push_back(momentum && l != 1 ? 0.7 : 0.0);
  }
  return rates;
}

// The recursion of a family's scalars by the definition: the product of the other scalars is
// recomputed each time.
struct Scalars {
  Family family;
  std::vector<double> rho, velocity;
  explicit Scalars(const Family& f) : family(f), rho(f.rho), velocity(f.rho.size(), 0.0) {}

  void step(const Rates& rates, double loss_scale) {
    const std::vector<double> old = rho;
    for (std::size_t i = 0; i < rho.size(); ++i) {
      const std::size_t l = static_cast<std::size_t>(family.first) + i;
      double gradient = loss_scale * family.coupling * old[i];
      for (std::size_t k = 0; k < rho.size(); ++k) {
        if (k != i) gradient *= old[k] * old[k];
      }
      velocity[i] = rates.momentum[l] * velocity[i] + gradient + rates.weight_decay[l] * old[i];
      rho[i] = old[i] - rates.learning_rate[l] * velocity[i];
    }
  }
  double loss(double loss_scale) const {
    double squares = family.coupling;
    for (const double r : rho) squares *= r * r;
    return 0.5 * loss_scale * family.multiplicity * squares;
  }
};

// Some families of a network: through all layers, and through some.
std::vector<Scalars> some_families(Index n_layers) {
  std::vector<double> rho;
  for (Index l = 0; l < n_layers; ++l) rho.push_back(0.9 - 0.1 * double(l));
  std::vector<Scalars> list{Scalars({0, 5.0, 1.0, rho}), Scalars({0, 2.0, 0.3, rho}),
                            Scalars({0, 7.0, 0.0, rho})};
  if (n_layers > 1) {
    list.push_back(Scalars({0, 1.0, 0.0, {0.4}}));
    list.push_back(Scalars({1, 3.0, 0.0, std::vector<double>(rho.begin() + 1, rho.end())}));
  }
  return list;
}

template <class T>
void compare_with_dense(const std::vector<Index>& widths, bool with_gram, bool momentum,
                        bool with_families) {
  const Index n_layers = static_cast<Index>(widths.size()) - 1;
  const Index widest = *std::max_element(widths.begin(), widths.end());
  std::vector<Matrix<T>> cores;
  for (Index l = 0; l < n_layers; ++l) {
    const double scale = 0.9 * std::sqrt(1.5 / double(std::max<Index>(1, widths[l])));
    cores.push_back(random_matrix<T>(widths[l + 1], widths[l], scale));
  }
  std::vector<Matrix<T>> whole = cores;
  const Index d_in = widths.front(), d_out = widths.back();
  Matrix<T> target = random_matrix<T>(d_out, d_in), gram, factor, factor_target;
  if (with_gram) {
    const Index rank = d_in > 4 ? d_in - 3 : d_in;
    factor = Matrix<T>::Identity(d_in, rank) +
             random_matrix<T>(d_in, rank, 0.5 / std::sqrt(double(std::max<Index>(1, d_in))));
    factor_target = random_matrix<T>(d_out, rank);
    gram = factor * factor.transpose();
    target = factor_target * factor.transpose();
  }
  Objective<T> objective;
  objective.target = target;
  objective.input_gram = gram;
  objective.input_factor = factor;
  objective.factor_target = factor_target;
  objective.loss_scale = 0.5;
  objective.loss_floor = 0.125;
  const Rates rates = some_rates(n_layers, momentum);
  std::vector<Scalars> scalars;
  if (with_families) scalars = some_families(n_layers);
  std::vector<Family> families;
  for (const auto& s : scalars) families.push_back(s.family);

  const Context context{1, nullptr};
  ReducedDescent<T> reduced(refs(cores), objective, families, rates, context);
  DenseDescent<T> dense(refs(whole), objective, rates, context, 0);
  CHECK(reduced.n_layers() == n_layers);
  const int steps = 15;
  const double allowed = check::tolerance<T>(widest, 2.0 * steps);
  for (int t = 0; t <= steps; ++t) {
    double wanted = dense.evaluate();
    std::vector<double> rho;
    for (const auto& s : scalars) {
      wanted += s.loss(0.5);
      rho.insert(rho.end(), s.rho.begin(), s.rho.end());
    }
    CHECK_NEAR(reduced.evaluate(), wanted, allowed * (1.0 + wanted));
    for (Index l = 0; l < n_layers; ++l) {
      CHECK_NEAR(distance(core(reduced, l, widths[l + 1], widths[l]), whole[l]), 0.0, allowed);
    }
    CHECK(reduced.rho().size() == rho.size());
    for (std::size_t i = 0; i < rho.size(); ++i) CHECK_NEAR(reduced.rho()[i], rho[i], 1e-14);
    reduced.update();
    dense.update();
    for (auto& s : scalars) s.step(rates, 0.5);
  }
}

template <class T>
void every_size_matches_dense() {
  for (Index size = 0; size <= 40; ++size) {
    for (Index n_layers = 1; n_layers <= 4; ++n_layers) {
      const int failures = check::failures;
      std::vector<Index> widths(static_cast<std::size_t>(n_layers) + 1, size);
      const bool odd = (size + n_layers) % 2 == 1;
      compare_with_dense<T>(widths, !odd, odd, odd);
      compare_with_dense<T>(widths, odd, odd, !odd);
      // Some cores are smaller than the largest one.
      for (auto& d : widths) d = std::max<Index>(0, size - check::pick(4));
      widths[static_cast<std::size_t>(check::pick(n_layers + 1))] = size;
      compare_with_dense<T>(widths, odd, !odd, true);
      compare_with_dense<T>(widths, !odd, !odd, false);
      if (check::failures > failures) {
        std::fprintf(stderr, "  size %d, %d layers\n", int(size), int(n_layers));
      }
    }
  }
}

// Returns W_{to:1} of a list of weights.
Matrix<double> chain(const std::vector<Matrix<double>>& weights, std::size_t to) {
  Matrix<double> m = weights[0];
  for (std::size_t l = 1; l < to; ++l) m = (weights[l] * m).eval();
  return m;
}

Matrix<double> orthonormal_basis(const Matrix<double>& columns) {
  Matrix<double> q = columns;
  for (Index j = 0; j < q.cols(); ++j) {
    for (int pass = 0; pass < 2; ++pass) {
      for (Index i = 0; i < j; ++i) q.col(j) -= q.col(i).dot(q.col(j)) * q.col(i).eval();
    }
    q.col(j) /= q.col(j).norm();
  }
  return q;
}

// A full network against the theorem: A_l C_l A_{l-1}^T + rho_l (Q_l - A_l A_{l-1}^T).
void network_matches_theorem(bool wide_target, double momentum) {
  const Index d = 14, r = 2, n_layers = 3;
  const double eps = 0.6;
  std::vector<Matrix<double>> q, weights, bases, cores;
  for (Index l = 0; l < n_layers; ++l) {
    q.push_back(random_orthonormal(wide_target && l + 1 == n_layers ? r : d, d));
    weights.push_back(eps * q.back());
  }
  const Index d_out = q.back().rows();
  Matrix<double> target = random_matrix<double>(d_out, r) * random_matrix<double>(r, d);
  Matrix<double> seeds(d, 2 * r);
  if (wide_target) {
    seeds << target.transpose(), chain(q, 3).transpose();
  } else {
    // Row and column spaces of a target of rank r.
    seeds << target.topRows(r).transpose(), chain(q, 3).transpose() * target.leftCols(r);
  }
  bases.push_back(orthonormal_basis(seeds));
  for (Index l = 0; l < n_layers; ++l) {
    const bool last = wide_target && l + 1 == n_layers;
    bases.push_back(last ? Matrix<double>::Identity(r, r) : Matrix<double>(q[l] * bases.back()));
    cores.push_back(bases[l + 1].transpose() * weights[l] * bases[l]);
  }
  Matrix<double> reduced_target = bases.back().transpose() * target * bases.front();

  Rates rates = some_rates(n_layers, false);
  for (auto& m : rates.momentum) m = momentum;
  Objective<double> objective;
  objective.target = target;
  objective.loss_scale = 0.4;
  DenseDescent<double> dense(refs(weights), objective, rates, Context{1, nullptr}, 0);
  objective.target = reduced_target;
  const Family complement{0, double(d - 2 * r), wide_target ? 0.0 : 1.0, {eps, eps, eps}};
  ReducedDescent<double> reduced(refs(cores), objective, {complement}, rates, Context{1, nullptr});
  for (int t = 0; t < 200; ++t) {
    const double loss = dense.evaluate();
    CHECK_NEAR(reduced.evaluate(), loss, 1e-12 * (1.0 + loss));
    for (Index l = 0; l < n_layers; ++l) {
      const auto c = core(reduced, l, bases[l + 1].cols(), bases[l].cols());
      Matrix<double> w = bases[l + 1] * c * bases[l].transpose();
      if (w.rows() == d) w += reduced.rho()[l] * (q[l] - bases[l + 1] * bases[l].transpose());
      CHECK_NEAR(distance(w, weights[l]), 0.0, 1e-13);
    }
    dense.update();
    reduced.update();
  }
}

void diverged_scalars_show_in_the_loss() {
  Matrix<double> c = Matrix<double>::Identity(2, 2), target = c, other = c;
  std::vector<MatrixRef<double>> cores{c, other};
  Objective<double> objective;
  objective.target = target;
  for (const bool coupled : {true, false}) {
    const Family family{0, 1.0, coupled ? 1.0 : 0.0, {0.5, coupled ? 1e100 : 1e300}};
    Rates rates{{1.0, 1.0}, {0.0, 1e250}, {0.0, 0.0}, {}};
    ReducedDescent<double> reduced(cores, objective, {family}, rates, Context{});
    reduced.evaluate();
    CHECK(largest_layer(reduced) == 2);
    reduced.update();
    CHECK(!std::isfinite(reduced.evaluate()));
    CHECK(largest_layer(reduced) == 2);
  }
}

void recorder_stores_records() {
  for (const Index size : {3, 35}) {
    std::vector<Matrix<double>> cores{random_matrix<double>(size, 2, 0.1),
                                      random_matrix<double>(4, size, 0.1)};
    Matrix<double> target = random_matrix<double>(4, 2);
    Objective<double> objective;
    objective.target = target;
    const Family family{0, 1.0, 1.0, {0.5, 0.25}};
    const Rates rates = some_rates(2, true);
    ReducedDescent<double> reduced(refs(cores), objective, {family}, rates, Context{1, nullptr});
    std::vector<double> first(2 * 2 * size), second(2 * 4 * size), rho(4), loss(6);
    Schedule schedule;
    schedule.steps = 5;
    schedule.record_every = 5;
    ReducedRecords<double> records{{{first.data(), {2, size, 2}}, {second.data(), {2, 4, size}}},
                                   {rho.data(), {2, 2}}};
    ReducedRecorder<double> recorder(reduced, records, schedule);
    std::int64_t n_losses = 0, n_recorded = 0, steps[2] = {};
    Monitor monitor;
    const auto first_core = cores;
    const Progress progress{loss.data(), steps, &n_losses, &n_recorded};
    CHECK(descend(reduced, recorder, schedule, progress, monitor).outcome == Outcome::finished);
    CHECK(n_recorded == 2 && steps[0] == 0 && steps[1] == 5 && n_losses == 6);
    CHECK(rho[0] == 0.5 && rho[1] == 0.25);
    CHECK(rho[2] == reduced.rho()[0] && rho[3] == reduced.rho()[1]);
    CHECK(std::equal(first.begin(), first.begin() + 2 * size, first_core[0].data()));
    const auto last = core(reduced, 1, 4, size);
    CHECK(std::equal(second.begin() + 4 * size, second.end(), last.data()));
  }
}

// A stepper that starts from the stored state takes the same steps, bit for bit.
template <class T>
void check_resume(Index width, bool momentum) {
  const Index n_layers = 3;
  std::vector<Matrix<T>> start;
  for (Index l = 0; l < n_layers; ++l) {
    start.push_back(random_matrix<T>(width, width, 0.9 * std::sqrt(1.5 / double(width))));
  }
  Matrix<T> target = random_matrix<T>(width, width);
  Objective<T> objective;
  objective.target = target;
  const Rates rates = some_rates(n_layers, momentum);
  std::vector<Family> families;
  std::vector<double> rho;
  for (const auto& s : some_families(n_layers)) {
    families.push_back(s.family);
    rho.insert(rho.end(), s.rho.begin(), s.rho.end());
  }
  struct SavedState {
    std::vector<Matrix<T>> cores, velocity, compensation;
    Matrix<double> scalars;
  };
  const auto initial_state = [&] {
    SavedState saved;
    saved.cores = start;
    for (const auto& core : start)
      saved.velocity.push_back(Matrix<T>::Zero(core.rows(), core.cols()));
    saved.compensation = saved.velocity;
    saved.scalars = Matrix<double>::Zero(3, static_cast<Index>(rho.size()));
    for (std::size_t i = 0; i < rho.size(); ++i) saved.scalars(0, static_cast<Index>(i)) = rho[i];
    return saved;
  };
  const auto run_steps = [&](SavedState& saved, int steps) {
    OptimizerState<T> state;
    if (momentum) state.velocity = refs(saved.velocity);
    if (width <= 32) state.compensation = refs(saved.compensation);
    ReducedDescent<T> descent(refs(saved.cores), objective, families, rates, Context{1, nullptr},
                              state, MatrixRef<double>(saved.scalars));
    double loss = 0.0;
    for (int t = 0; t < steps; ++t) {
      loss = descent.evaluate();
      descent.update();
    }
    descent.store();
    return loss;
  };
  SavedState whole = initial_state(), parts = initial_state();
  const double loss = run_steps(whole, 11);
  run_steps(parts, 4);
  CHECK(run_steps(parts, 7) == loss);
  CHECK(parts.scalars == whole.scalars);
  for (std::size_t l = 0; l < start.size(); ++l) {
    CHECK(parts.cores[l] == whole.cores[l]);
    CHECK(parts.velocity[l] == whole.velocity[l] && parts.compensation[l] == whole.compensation[l]);
  }
}

void runs_resume() {
  for (const Index width : {1, 5, 8, 20, 32, 40}) {
    for (const bool momentum : {false, true}) {
      check_resume<double>(width, momentum);
      check_resume<float>(width, momentum);
    }
  }
}

void sizes_are_checked() {
  Matrix<double> c1(4, 3), c2(2, 4), target(2, 3), factor(3, 3), wrong(3, 4);
  Objective<double> good;
  good.target = target;
  const std::vector<Family> two{{0, 1.0, 1.0, {1.0, 1.0}}};
  const Rates rates = some_rates(2, false);
  const auto build = [](std::vector<MatrixRef<double>> cores, const Objective<double>& objective,
                        const std::vector<Family>& families, const Rates& r) {
    ReducedDescent<double>(std::move(cores), objective, families, r, Context{});
  };
  build({c1, c2}, good, two, rates);
  CHECK_THROWS(build({}, good, {}, Rates{}), ShapeError);
  CHECK_THROWS(build({c2, c1}, good, two, rates), ShapeError);
  CHECK_THROWS(build({c1, wrong}, good, two, rates), ShapeError);
  CHECK_THROWS(build({c1}, good, two, rates), ShapeError);
  build({c1, c2}, good, {}, rates);
  build({c1, c2}, good, {{1, 1.0, 0.0, {1.0}}}, rates);
  for (const Family& bad : std::vector<Family>{{0, 1.0, 1.0, {1.0}},
                                               {0, 1.0, 0.0, {}},
                                               {-1, 1.0, 0.0, {1.0}},
                                               {2, 1.0, 0.0, {1.0}},
                                               {1, 1.0, 0.0, {1.0, 1.0}},
                                               {0, 1.0, 1.0, {1.0, 1.0, 1.0}}}) {
    CHECK_THROWS(build({c1, c2}, good, {bad}, rates), ShapeError);
  }
  Objective<double> o = good;
  o.target = wrong;
  CHECK_THROWS(build({c1, c2}, o, two, rates), ShapeError);
  o = good;
  o.input_gram = factor;
  CHECK_THROWS(build({c1, c2}, o, two, rates), ShapeError);
  o.input_factor = factor;
  CHECK_THROWS(build({c1, c2}, o, two, rates), ShapeError);
  o.factor_target = target;
  build({c1, c2}, o, two, rates);
  o.input_factor = wrong;
  CHECK_THROWS(build({c1, c2}, o, two, rates), ShapeError);
  for (auto list : {&Rates::learning_rate, &Rates::weight_decay, &Rates::momentum}) {
    Rates few = rates;
    (few.*list).pop_back();
    CHECK_THROWS(build({c1, c2}, good, two, few), ShapeError);
  }
  ReducedDescent<double> reduced({c1, c2}, good, two, rates, Context{});
  double out[12];
  CHECK_THROWS(reduced.copy_core(2, out), ShapeError);
  CHECK_THROWS(reduced.copy_core(-1, out), ShapeError);
}

}  // namespace

int main() {
  every_size_matches_dense<double>();
  every_size_matches_dense<float>();
  for (const double momentum : {0.0, 0.8}) {
    network_matches_theorem(false, momentum);
    network_matches_theorem(true, momentum);
  }
  diverged_scalars_show_in_the_loss();
  recorder_stores_records();
  runs_resume();
  sizes_are_checked();
  return check::result();
}
