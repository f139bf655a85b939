// SPDX-License-Identifier: MIT
// Many small reduced runs of equal shape in one call.
//
// The runs share their widths, the layers of their families and their schedule; everything else
// differs from run to run. Cores of width up to 8 are updated side by side, one run per SIMD lane.
// Larger cores run one after the other, each as a ReducedDescent. Threads share the work; the
// results do not depend on the number of threads.
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

// Layers first .. first + length - 1 of a family of directions (reduced_descent.hpp).
struct FamilySpan {
  Index first = 0;
  Index length = 0;
  DLNFAST_FIELDS("FamilySpan", first, length)
};

// Initial values and settings of all runs. Matrices of doubles have one row per run.
template <class T>
struct Batch {
  std::vector<Stack<const T>> cores;  // [l]: C_l(0) of every run, a_l x a_{l-1}
  Stack<const T> target;              // a_L x a_0
  // As in Objective: all of them or none. Where ranks differ, shorter factors are padded by zero
  // columns.
  Stack<const T> input_gram, input_factor, factor_target;
  std::vector<FamilySpan> families;
  MatrixRef<const double> rho;                     // initial scalars, family after family
  MatrixRef<const double> multiplicity, coupling;  // one value per family
  MatrixRef<const double> learning_rate, weight_decay, momentum;  // one value per layer
  MatrixRef<const double> loss_scale, loss_floor;                 // one value
  DLNFAST_FIELDS("BatchInputs", target, input_gram, input_factor, factor_target, families, rho,
                 multiplicity, coupling, learning_rate, weight_decay, momentum, loss_scale,
                 loss_floor)
};

// Records of all runs. Record k of a run shows step min(k record_every, n_losses - 1).
template <class T>
struct BatchRecords {
  MatrixRef<double> loss;                    // n_runs x (steps + 1)
  std::vector<ArrayRef<T, 4>> core_records;  // [l]: n_runs x n_records x a_l x a_{l-1}; or none
  Stack<double> rho_records;       // n_runs of n_records x n_scalars; absent: not recorded
  MatrixRef<std::int64_t> counts;  // n_runs x 2: numbers of valid losses and records
  DLNFAST_FIELDS("BatchRecords", loss, core_records, rho_records, counts)
};

// Runs all members of a batch. Every run stops on its own when it diverges or reaches the
// tolerance. Does not write losses and records beyond the counts. After an exception, the counts
// give the valid losses and records of each run.
template <class T>
std::vector<Result> batch_descent(const Batch<T>& batch, const Schedule& schedule,
                                  const BatchRecords<T>& records, const Context& context);

extern template std::vector<Result> batch_descent(const Batch<float>&, const Schedule&,
                                                  const BatchRecords<float>&, const Context&);
extern template std::vector<Result> batch_descent(const Batch<double>&, const Schedule&,
                                                  const BatchRecords<double>&, const Context&);

}  // namespace dlnfast
