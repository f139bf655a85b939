// SPDX-License-Identifier: MIT
#include "dlnfast/batch_descent.hpp"

#include <algorithm>
#include <chrono>
#include <vector>

#include "check.hpp"
#include "dlnfast/errors.hpp"
#include "dlnfast/recorders.hpp"
#include "dlnfast/reduced_descent.hpp"

using namespace dlnfast;
using check::distance;
using check::pick;
using check::random_matrix;
using check::uniform;

namespace {

// Runs of one shape, and memory for their records.
template <class T>
struct Runs {
  Index n, n_layers, n_records, n_scalars = 0;
  std::vector<Index> widths;
  Schedule schedule;
  std::vector<Matrix<T>> cores, core_records;     // one matrix per layer, runs stacked
  Matrix<T> target, gram, factor, factor_target;  // the last three empty where S = I
  Index rank = 0;
  std::vector<FamilySpan> families;
  Matrix<double> rho, multiplicity, coupling, learning_rate, weight_decay, momentum, loss_scale,
      loss_floor, loss, rho_records;
  std::vector<std::int64_t> counts;

  Runs(Index n_, const std::vector<Index>& widths_, const Schedule& schedule_, bool with_gram,
       bool with_momentum)
      : n(n_),
        n_layers(static_cast<Index>(widths_.size()) - 1),
        n_records(dlnfast::n_records(schedule_)),
        widths(widths_),
        schedule(schedule_) {
    const Index d_in = widths.front(), d_out = widths.back();
    for (Index l = 0; l < n_layers; ++l) {
      const Index rows = widths[l + 1], cols = widths[l];
      const double scale = 0.9 * std::sqrt(1.5 / double(std::max<Index>(1, cols)));
      cores.push_back(random_matrix<T>(n * rows, cols, scale));
      core_records.push_back(Matrix<T>::Constant(n * n_records * rows, cols, T(-7)));
    }
    rank = with_gram && d_in > 4 ? d_in - 3 : d_in;
    target = random_matrix<T>(n * d_out, d_in);
    if (with_gram) {
      gram.resize(n * d_in, d_in);
      factor_target = random_matrix<T>(n * d_out, rank);
      factor = random_matrix<T>(n * d_in, rank, 0.5 / std::sqrt(double(std::max<Index>(1, d_in))));
      for (Index i = 0; i < n; ++i) {
        factor.middleRows(i * d_in, d_in) += Matrix<T>::Identity(d_in, rank);
        const Matrix<T> f = factor.middleRows(i * d_in, d_in);
        gram.middleRows(i * d_in, d_in) = f * f.transpose();
        target.middleRows(i * d_out, d_out) =
            factor_target.middleRows(i * d_out, d_out) * f.transpose();
      }
    }
    families.push_back({0, n_layers});
    if (n_layers > 1) families.push_back({1, n_layers - 1});
    for (const FamilySpan& family : families) n_scalars += family.length;
    const Index n_families = static_cast<Index>(families.size());
    rho = positive(n_scalars);
    multiplicity = positive(n_families);
    coupling = Matrix<double>::Zero(n, n_families);
    for (Index i = 0; i < n; ++i) coupling(i, 0) = i % 3 == 0 ? 0.0 : 0.5 + 0.1 * double(i % 5);
    learning_rate = 0.02 * positive(n_layers);
    weight_decay = 0.05 * positive(n_layers);
    momentum = (with_momentum ? 0.7 : 0.0) * positive(n_layers);
    loss_scale = 0.5 * positive(1);
    loss_floor = 0.1 * positive(1);
    loss = Matrix<double>::Constant(n, schedule.steps + 1, -7.0);
    rho_records = Matrix<double>::Constant(n * n_records, n_scalars, -7.0);
    counts.assign(static_cast<std::size_t>(2 * n), -1);
  }

  Matrix<double> positive(Index cols) const {
    return (random_matrix<double>(n, cols, 0.4).array() + 0.6).matrix();
  }

  Batch<T> batch() {
    Batch<T> b;
    for (Index l = 0; l < n_layers; ++l) {
      b.cores.push_back({cores[l].data(), n, widths[l + 1], widths[l]});
    }
    b.target = {target.data(), n, widths.back(), widths.front()};
    if (gram.size() > 0) {
      b.input_gram = {gram.data(), n, widths.front(), widths.front()};
      b.input_factor = {factor.data(), n, widths.front(), rank};
      b.factor_target = {factor_target.data(), n, widths.back(), rank};
    }
    b.families = families;
    b.rho = MatrixRef<double>(rho);
    b.multiplicity = MatrixRef<double>(multiplicity);
    b.coupling = MatrixRef<double>(coupling);
    b.learning_rate = MatrixRef<double>(learning_rate);
    b.weight_decay = MatrixRef<double>(weight_decay);
    b.momentum = MatrixRef<double>(momentum);
    b.loss_scale = MatrixRef<double>(loss_scale);
    b.loss_floor = MatrixRef<double>(loss_floor);
    return b;
  }

  BatchRecords<T> records() {
    BatchRecords<T> r;
    r.loss = loss;
    for (Index l = 0; l < n_layers; ++l) {
      r.core_records.push_back({core_records[l].data(), {n, n_records, widths[l + 1], widths[l]}});
    }
    r.rho_records = {rho_records.data(), n, n_records, n_scalars};
    r.counts = {counts.data(), n, 2};
    return r;
  }

  std::vector<Result> run(int n_threads) {
    return batch_descent<T>(batch(), schedule, records(), Context{n_threads, nullptr});
  }

  // Runs member i with the engine for single runs, and writes to another batch.
  Result single(Index i, Runs& out) {
    std::vector<Matrix<T>> own;
    std::vector<MatrixRef<T>> refs;
    ReducedRecords<T> single_records;
    for (Index l = 0; l < n_layers; ++l) {
      own.push_back(cores[l].middleRows(i * widths[l + 1], widths[l + 1]));
      single_records.cores.push_back(
          {out.core_records[l].data() + i * n_records * widths[l + 1] * widths[l],
           {n_records, widths[l + 1], widths[l]}});
    }
    for (auto& m : own) refs.emplace_back(m);
    single_records.rho = {out.rho_records.data() + i * n_records * n_scalars,
                          {n_records, n_scalars}};
    Matrix<T> t = target.middleRows(i * widths.back(), widths.back()), s, f, g;
    Objective<T> objective;
    objective.target = t;
    if (gram.size() > 0) {
      s = gram.middleRows(i * widths.front(), widths.front());
      f = factor.middleRows(i * widths.front(), widths.front());
      g = factor_target.middleRows(i * widths.back(), widths.back());
      objective.input_gram = s;
      objective.input_factor = f;
      objective.factor_target = g;
    }
    objective.loss_scale = loss_scale(i, 0);
    objective.loss_floor = loss_floor(i, 0);
    std::vector<Family> list;
    const double* value = rho.data() + i * n_scalars;
    for (std::size_t f = 0; f < families.size(); ++f) {
      list.push_back({families[f].first, multiplicity(i, f), coupling(i, f),
                      std::vector<double>(value, value + families[f].length)});
      value += families[f].length;
    }
    const auto row = [i](const Matrix<double>& rates) {
      return std::vector<double>(rates.row(i).begin(), rates.row(i).end());
    };
    const Rates rates{row(learning_rate), row(weight_decay), row(momentum)};
    ReducedDescent<T> stepper(refs, objective, list, rates, Context{1, nullptr});
    ReducedRecorder<T> recorder(stepper, single_records, schedule);
    std::vector<std::int64_t> steps(static_cast<std::size_t>(n_records));
    Monitor monitor;
    const Progress progress{out.loss.data() + i * (schedule.steps + 1), steps.data(),
                            &out.counts[2 * i], &out.counts[2 * i + 1]};
    out.counts[2 * i] = out.counts[2 * i + 1] = 0;
    return descend(stepper, recorder, schedule, progress, monitor);
  }
};

template <class T>
void compare(Runs<T>& runs, int n_threads) {
  Runs<T> wanted = runs;
  std::vector<Result> expected;
  for (Index i = 0; i < runs.n; ++i) expected.push_back(runs.single(i, wanted));
  const std::vector<Result> got = runs.run(n_threads);
  CHECK(static_cast<Index>(got.size()) == runs.n);
  if (runs.n == 0) return;
  CHECK(runs.counts == wanted.counts);
  for (Index i = 0; i < runs.n; ++i) {
    CHECK(got[i].outcome == expected[i].outcome && got[i].step == expected[i].step);
  }
  const Index widest = *std::max_element(runs.widths.begin(), runs.widths.end());
  const double allowed = check::tolerance<T>(widest, 4.0 * double(runs.schedule.steps + 1));
  CHECK_NEAR(distance(runs.loss, wanted.loss), 0.0, allowed * (1.0 + wanted.loss.maxCoeff()));
  CHECK_NEAR(distance(runs.rho_records, wanted.rho_records), 0.0, 1e-13);
  for (Index l = 0; l < runs.n_layers; ++l) {
    CHECK_NEAR(distance(runs.core_records[l], wanted.core_records[l]), 0.0, 4.0 * allowed);
  }
}

template <class T>
void all_shapes_match_single_runs() {
  Schedule schedule;
  schedule.steps = 11;
  schedule.record_every = 4;
  for (const Index size : {0, 1, 2, 3, 5, 6, 7, 8, 9, 17}) {
    for (const Index n_layers : {1, 2, 3, 4}) {
      for (const Index n : {0, 1, 7, 8, 9, 37}) {
        std::vector<Index> widths(static_cast<std::size_t>(n_layers) + 1, size);
        widths[static_cast<std::size_t>(pick(n_layers + 1))] = std::max<Index>(0, size - pick(3));
        Runs<T> runs(n, widths, schedule, pick(3) == 0, pick(2) == 0);
        const int failures = check::failures;
        compare(runs, n % 2 == 0 ? 2 : (n % 3 == 0 ? 7 : 1));
        if (check::failures > failures) {
          std::fprintf(stderr, "  size %d, %d layers, %d runs\n", int(size), int(n_layers), int(n));
        }
      }
    }
  }
}

// Lanes that diverge or reach the tolerance end without affecting the others.
void runs_end_independently() {
  Schedule schedule;
  schedule.steps = 60;
  schedule.record_every = 7;
  schedule.tolerance = 0.9;
  Runs<double> runs(21, {4, 4, 4}, schedule, false, false);
  for (Index i = 0; i < runs.n; i += 5) runs.learning_rate.row(i).setConstant(100.0);
  compare(runs, 2);
  const std::vector<Result> again = runs.run(1);
  Index diverged = 0, converged = 0;
  for (const Result& result : again) {
    diverged += result.outcome == Outcome::diverged ? 1 : 0;
    converged += result.outcome == Outcome::converged ? 1 : 0;
  }
  CHECK(diverged >= 1);
  CHECK(converged >= 1);
}

void interrupt_stops_all_threads() {
  Schedule schedule;
  schedule.steps = 200'000;
  schedule.record_every = schedule.steps;
  for (const Index size : {6, 20}) {
    for (const int n_threads : {1, 2}) {
      Runs<double> runs(64, {size, size, size}, schedule, false, false);
      Monitor monitor([](Index, double, bool) { return Answer::abort; });
      const auto start = std::chrono::steady_clock::now();
      CHECK_THROWS(batch_descent<double>(runs.batch(), schedule, runs.records(),
                                         Context{n_threads, &monitor}),
                   Interrupted);
      const std::chrono::duration<double> late = std::chrono::steady_clock::now() - start;
      CHECK(late.count() < 5.0);  // on any machine; the whole run would take far longer
    }
  }
}

void sizes_are_checked() {
  Schedule schedule;
  schedule.steps = 2;
  Runs<double> runs(3, {6, 3, 2}, schedule, true, false);
  const auto throws = [&](auto&& change) {
    Batch<double> batch = runs.batch();
    BatchRecords<double> records = runs.records();
    change(batch, records);
    CHECK_THROWS(batch_descent<double>(batch, schedule, records, Context{}), ShapeError);
  };
  using B = Batch<double>&;
  using R = BatchRecords<double>&;
  throws([](B b, R) { b.cores.clear(); });
  throws([](B b, R) { b.cores[1].cols = 4; });
  throws([](B b, R) { b.cores[1].n = 2; });
  throws([](B b, R) { b.target.rows = 3; });
  throws([](B b, R) { b.input_factor.n = 2; });
  throws([](B b, R) { b.input_gram.cols = 5; });
  throws([](B b, R) { b.input_factor = {}; });
  throws([](B b, R) { b.factor_target.cols = 2; });
  throws([](B b, R) { b.families[0].length = 3; });
  throws([](B b, R) { b.families[1].first = -1; });
  throws([](B b, R) { b.rho.cols = 1; });
  throws([](B b, R) { b.coupling.rows = 2; });
  throws([](B b, R) { b.momentum.cols = 1; });
  throws([](B b, R) { b.loss_floor.cols = 2; });
  throws([](B, R r) { r.loss.cols = 2; });
  throws([](B, R r) { r.counts.rows = 2; });
  throws([](B, R r) { r.core_records[0].shape[2] = 4; });
  throws([](B, R r) { r.rho_records.rows = 2; });
}

}  // namespace

int main() {
  all_shapes_match_single_runs<double>();
  all_shapes_match_single_runs<float>();
  runs_end_independently();
  interrupt_stops_all_threads();
  sizes_are_checked();
  return check::result();
}
