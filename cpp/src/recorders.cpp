#include "dlnfast/recorders.hpp"

#include <algorithm>

#include "dlnfast/singular_values.hpp"

namespace dlnfast {

template <class T>
void DenseRecorder<T>::record(Index record, Index /*step*/) {
  // Asked for at every record, so that a caller who looks then sees them.
  const std::vector<MatrixRef<T>>& weights = stepper_.weights();
  for (std::size_t l = 0; l < records_.values.size(); ++l) {
    const MatrixRef<T>& w = weights[l];
    const Index k = records_.n_values[l];
    const MatrixRef<T> values(records_.values[l] + record * k, 1, k);
    MatrixRef<T> left, right;
    if (!records_.left.empty()) {
      left = {records_.left[l] + record * w.rows * k, w.rows, k};
      right = {records_.right[l] + record * w.cols * k, w.cols, k};
    }
    singular_values<T>(w, values, left, right, context_);
  }
}

template <class T>
void DenseRecorder<T>::after_step(Index step, bool /*last*/) {
  if (records_.snapshot_every == 0 || step % records_.snapshot_every != 0) return;
  const Index snapshot = *records_.n_snapshots;
  const std::vector<MatrixRef<T>>& weights = stepper_.weights();
  for (std::size_t l = 0; l < weights.size(); ++l) {
    const MatrixRef<T>& w = weights[l];
    const MatrixRef<T> out(records_.snapshots[l] + snapshot * w.rows * w.cols, w.rows, w.cols);
    out.map() = w.map();
  }
  *records_.n_snapshots = snapshot + 1;
}

template <class T>
void ReducedRecorder<T>::record(Index record, Index /*step*/) {
  for (std::size_t l = 0; l < records_.cores.size(); ++l) {
    stepper_.copy_core(static_cast<Index>(l), records_.cores[l] + record * records_.core_sizes[l]);
  }
  const std::vector<double>& rho = stepper_.rho();
  std::copy(rho.begin(), rho.end(), records_.rho + record * static_cast<Index>(rho.size()));
}

template class DenseRecorder<float>;
template class DenseRecorder<double>;
template class ReducedRecorder<float>;
template class ReducedRecorder<double>;

}  // namespace dlnfast
