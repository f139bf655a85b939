// SPDX-License-Identifier: MIT
// The dense tier of a tracker: a sweep, error bounds, and, if these are too large, a certificate
// and new starting vectors.
#pragma once

#include "dlnfast/linear_operator.hpp"
#include "dlnfast/random.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "krylov_certificate.hpp"
#include "origin_bound.hpp"
#include "subspace_iteration.hpp"
#include "tail_bounds.hpp"

namespace dlnfast {

// Input of one update of the dense tier.
template <class T>
struct DenseUpdate {
  const LinearOperator<T>& w;        // in units of the tracker
  const MatrixRef<const T>* matrix;  // W itself, not in these units; null for an operator
  double factor;                     // the unit: w is factor * W
  double squared_norm;               // ||W||_F^2; negative: unknown
  TrackerRecord& record;             // output
  const Context& context;
};

// A tail to certify: the complement of the first j pairs is below tau, with this error of the values then.
struct GramTail {
  Index j;
  double tau, error;
};

template <class T>
class DenseTier {
 public:
  // `subspace` and `random` must outlive the tier.
  DenseTier(const TrackerSettings& settings, SubspaceIteration<T>& subspace, Random& random)
      : settings_(settings),
        subspace_(subspace),
        tails_(subspace, settings.tolerance),
        certificate_(settings, subspace, random) {}

  TailBounds<T>& tails() { return tails_; }
  OriginBound<T>& origin() { return origin_; }
  std::int64_t n_refreshes() const { return n_refreshes_; }
  std::int64_t n_certificates() const { return certificate_.count(); }

  // Replaces the reported pairs by those of W, and writes the record's errors. After an exception
  // the blocks are undefined: call `reset`.
  void update(const DenseUpdate<T>& update);
  // Discards all state; the next update starts from random vectors.
  void reset();
  // Discards the bounds of earlier updates, because the unit has changed.
  void reset_bounds();

 private:
  // Products with W^T W between two sweeps: fewer while the errors stay far below the tolerance.
  static constexpr Index least_steps = 2, most_steps = 8;

  void sweep(const DenseUpdate<T>& update);
  void find_errors(const DenseUpdate<T>& update);
  void bound(const DenseUpdate<T>& update);
  bool is_refresh_due(const DenseUpdate<T>& update) const;
  bool certify_by_gram(const DenseUpdate<T>& update);
  GramTail choose_gram_tail() const;
  void refresh(const DenseUpdate<T>& update, bool is_first);
  void initialize_origin(const DenseUpdate<T>& update);
  bool would_sweep_help() const;

  TrackerSettings settings_;
  SubspaceIteration<T>& subspace_;
  TailBounds<T> tails_;
  OriginBound<T> origin_;
  KrylovCertificate<T> certificate_;
  std::int64_t n_refreshes_ = 0;
  Index n_steps_ = most_steps;  // of the next acceleration
  double last_squared_norm_ = -1.0;
  bool was_one_cluster_ = false;  // all reported values were equal at the last update
};

extern template class DenseTier<float>;
extern template class DenseTier<double>;

}  // namespace dlnfast
