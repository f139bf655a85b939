// SPDX-License-Identifier: MIT
// Many small reduced runs of equal shape in one call.
//
// The runs have in common their widths, the layers of their families and their schedule; all else is
// each run's own. Cores of sizes up to 8 descend side by side, one run per SIMD lane; larger ones
// one run after the other, each as a ReducedDescent. Threads share the work, and what a run gives
// does not depend on how many they are.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/descent.hpp"

namespace dlnfast {

// Matrices of equal shape, contiguous, one after the other.
template <class T>
struct Stack {
  T* data = nullptr;
  Index n = 0;
  Index rows = 0;
  Index cols = 0;

  MatrixRef<T> operator[](Index i) const { return {data + i * rows * cols, rows, cols}; }
  bool absent() const { return data == nullptr && n == 0 && rows == 0 && cols == 0; }
};

// A family of directions (reduced_descent.hpp) runs through the layers first .. first + length - 1.
struct FamilySpan {
  Index first = 0;
  Index length = 0;
  DLNFAST_FIELDS("FamilySpan", first, length)
};

// The runs. Matrices of doubles have one row per run.
template <class T>
struct Batch {
  std::vector<Stack<const T>> cores;  // [l]: C_l(0) of every run, a_l x a_{l-1}
  Stack<const T> target;              // a_L x a_0
  // As in Objective, all or none; columns of zeros where ranks differ.
  Stack<const T> input_gram, input_factor, factor_target;
  std::vector<FamilySpan> families;
  MatrixRef<const double> rho;                     // scalars at the start, family after family
  MatrixRef<const double> multiplicity, coupling;  // one value per family
  MatrixRef<const double> learning_rate, weight_decay, momentum;  // one value per layer
  MatrixRef<const double> loss_scale, loss_floor;                 // one value
  DLNFAST_FIELDS("BatchInputs", target, input_gram, input_factor, factor_target, families, rho,
                 multiplicity, coupling, learning_rate, weight_decay, momentum, loss_scale,
                 loss_floor)
};

// What the runs leave behind. Record k of a run shows step min(k record_every, n_losses - 1).
template <class T>
struct BatchRecords {
  MatrixRef<double> loss;                    // n_runs x (steps + 1)
  std::vector<ArrayRef<T, 4>> core_records;  // [l]: n_runs x n_records x a_l x a_{l-1}; or none
  Stack<double> rho_records;                 // n_runs of n_records x n_scalars; absent: not kept
  MatrixRef<std::int64_t> counts;            // n_runs x 2: how many losses and records are valid
  DLNFAST_FIELDS("BatchRecords", loss, core_records, rho_records, counts)
};

// Each run ends for itself: a run that diverges, or comes down to the tolerance, leaves the others
// alone. Losses and records beyond the counts are not touched. After an exception the counts tell
// what had been reached.
template <class T>
std::vector<Result> batch_descent(const Batch<T>& batch, const Schedule& schedule,
                                  const BatchRecords<T>& records, const Context& context);

extern template std::vector<Result> batch_descent(const Batch<float>&, const Schedule&,
                                                  const BatchRecords<float>&, const Context&);
extern template std::vector<Result> batch_descent(const Batch<double>&, const Schedule&,
                                                  const BatchRecords<double>&, const Context&);

}  // namespace dlnfast
