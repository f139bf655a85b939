// What a run keeps at its records, written to arrays of the caller.
#pragma once

#include <cstdint>
#include <vector>

#include "dlnfast/dense_descent.hpp"
#include "dlnfast/reduced_descent.hpp"

namespace dlnfast {

// Arrays with a leading axis of records (snapshots: of snapshots), one per layer; an empty list
// keeps nothing.
template <class T>
struct DenseRecords {
  std::vector<Index> n_values;
  std::vector<T*> values;     // n_values[l]
  std::vector<T*> left;       // d_l x n_values[l]
  std::vector<T*> right;      // d_{l-1} x n_values[l]
  std::vector<T*> snapshots;  // d_l x d_{l-1}, at steps 0, snapshot_every, ..
  Index snapshot_every = 0;
  std::int64_t* n_snapshots = nullptr;
};

template <class T>
class DenseRecorder final : public Recorder {
 public:
  DenseRecorder(const DenseDescent<T>& stepper, DenseRecords<T> records, const Context& context)
      : stepper_(stepper), records_(std::move(records)), context_(context) {}
  void record(Index record, Index step) override;
  void after_step(Index step, bool last) override;

 private:
  const DenseDescent<T>& stepper_;
  DenseRecords<T> records_;
  Context context_;
};

template <class T>
struct ReducedRecords {
  std::vector<Index> core_sizes;
  std::vector<T*> cores;  // a_l x a_{l-1}
  double* rho = nullptr;  // L
};

template <class T>
class ReducedRecorder final : public Recorder {
 public:
  ReducedRecorder(const ReducedDescent<T>& stepper, ReducedRecords<T> records)
      : stepper_(stepper), records_(std::move(records)) {}
  void record(Index record, Index step) override;

 private:
  const ReducedDescent<T>& stepper_;
  ReducedRecords<T> records_;
};

extern template class DenseRecorder<float>;
extern template class DenseRecorder<double>;
extern template class ReducedRecorder<float>;
extern template class ReducedRecorder<double>;

}  // namespace dlnfast
