// SPDX-License-Identifier: MIT
#include "dense_tier.hpp"

#include <algorithm>
#include <cmath>

#include "gram_certificate.hpp"

namespace dlnfast {
namespace {

constexpr int most_accelerations = 4;

}  // namespace

template <class T>
void DenseTier<T>::update(const DenseUpdate<T>& update) {
  update.record.tier = Tier::dense;
  const bool is_first = subspace_.prepare(update.context);
  sweep(update);
  bound(update);
  const bool is_affordable = !std::isfinite(tails_.drift()) || certificate_.is_affordable();
  if (is_first || is_refresh_due(update) || (!tails_.is_good_enough() && is_affordable)) {
    if (!certify_by_gram(update)) refresh(update, is_first);
  }
  if (is_first) {
    certificate_.reset_credit();
    initialize_origin(update);
  }
  for (Index i = 1; i < settings_.max_sweeps && !tails_.is_good_enough() && would_sweep_help();
       ++i) {
    sweep(update);
    find_errors(update);
  }
  subspace_.reuse_invariant_block();
  const std::vector<double>& values = subspace_.reported().values;
  const Index k = subspace_.shape().k;
  was_one_cluster_ = values[0] - values[k - 1] <= 1e-10 * values[0] && k > 1;
  last_squared_norm_ = update.squared_norm;
}

template <class T>
void DenseTier<T>::reset() {
  tails_.reset();
  subspace_.reset();
}

template <class T>
void DenseTier<T>::reset_bounds() {
  tails_.reset();
  tails_.set_drift(infinity);
  origin_.reset();
}

template <class T>
void DenseTier<T>::sweep(const DenseUpdate<T>& update) {
  tails_.invalidate_pairs();
  subspace_.sweep(update.w, origin_.image(), update.context);
  const Index n_columns = 2 * subspace_.size();
  update.record.n_columns += n_columns;
  certificate_.add_credit(n_columns);
}

template <class T>
void DenseTier<T>::find_errors(const DenseUpdate<T>& update) {
  tails_.find_errors(update.squared_norm, update.record, update.context);
}

// Bounds the errors after the first sweep. Uses W_0 if they are too large without it.
template <class T>
void DenseTier<T>::bound(const DenseUpdate<T>& update) {
  // The errors will be too large after so much drift.
  const bool is_drift_too_large =
      !(tails_.drift() <= 0.5 * settings_.tolerance * subspace_.reported().values[0]);
  if (origin_.is_compared() && is_drift_too_large) {
    tails_.skip_errors();
  } else {
    find_errors(update);
  }
  if (!origin_.is_compared() || tails_.is_good_enough()) return;
  const Bound tail =
      origin_.compare(subspace_, update.squared_norm, update.record.n_columns, update.context);
  tails_.certify(tail, subspace_.size());
  find_errors(update);
  origin_.schedule(tails_.is_good_enough(), update.record.update);
}

template <class T>
bool DenseTier<T>::is_refresh_due(const DenseUpdate<T>& update) const {
  // A single cluster determines no directions: once W has changed, search for those in which it
  // splits.
  const bool may_split = was_one_cluster_ && update.squared_norm != last_squared_norm_ &&
                         subspace_.size() < subspace_.shape().smaller;
  return may_split ||
         (settings_.refresh_every > 0 && update.record.update % settings_.refresh_every == 0);
}

// Converges the pairs and bounds their complement by a Gram matrix. Returns false if that is not worth its cost,
// or a value was missed.
template <class T>
bool DenseTier<T>::certify_by_gram(const DenseUpdate<T>& update) {
  if (update.matrix == nullptr || settings_.tolerance > krylov_tolerance ||
      subspace_.shape().smaller > largest_certified_size ||
      subspace_.size() == subspace_.shape().smaller) {
    return false;
  }
  if (tails_.is_good_enough()) return true;
  const double wanted = settings_.tolerance * subspace_.reported().values[0];
  GramTail tail = choose_gram_tail();
  for (int round = 0; round < most_accelerations && tail.error > 0.5 * wanted; ++round) {
    if (round > 0) n_steps_ = most_steps;
    subspace_.accelerate(update.w, n_steps_, update.context);
    update.record.n_columns += 2 * n_steps_ * subspace_.size();
    sweep(update);
    tail = choose_gram_tail();
    if (tail.error < 0.3 * wanted) n_steps_ = std::max(least_steps, n_steps_ - 1);
  }
  update.record.refreshed = true;
  ++n_refreshes_;
  const double bound = bound_complement<T>(*update.matrix, update.factor, subspace_.measured(),
                                           tail.j, tail.tau, update.context);
  if (std::isfinite(bound)) tails_.certify({bound, Completeness::rigorous}, tail.j);
  find_errors(update);
  return std::isfinite(bound);
}

// Chooses the pairs and the bound on their complement for which the errors of the values are least. Values
// that are not measured are expected to be below the next measured one.
template <class T>
GramTail DenseTier<T>::choose_gram_tail() const {
  const std::vector<double>& s = subspace_.measured().values;
  const Index k = subspace_.shape().k, p = subspace_.size();
  const double least_gap = 0.25 * settings_.tolerance * s[0];
  GramTail best{p, 0.0, infinity};
  for (Index j = k; j <= p; ++j) {
    const double next = s[std::min(j, p - 1)];
    const double tau = std::max(0.5 * (next + s[k - 1]), next + least_gap);
    const double residual = subspace_.residual(0, j);
    double error = 0.0;
    for (Index i = 0; i < k; ++i) {
      error =
          std::max(error, s[i] > tau ? perturbation(s[i] - tau, residual) : tau + residual - s[i]);
    }
    if (error < best.error) best = {j, tau, error};
  }
  return best;
}

// Bounds the complement of the separated pairs by a certificate. If the certificate finds a
// direction that should be tracked, sweeps from there, up to three times.
template <class T>
void DenseTier<T>::refresh(const DenseUpdate<T>& update, bool is_first) {
  if (subspace_.size() == subspace_.shape().smaller) return;
  update.record.refreshed = true;
  ++n_refreshes_;
  Index j = is_first ? 0 : subspace_.n_separated(settings_.tolerance);
  for (int round = 0; round < 3; ++round) {
    const auto found = certificate_.bound(update.w, j, update.context);
    tails_.certify(found.bound, j);
    update.record.n_columns += found.n_columns;
    const bool is_missed =
        found.theta > subspace_.reported().values[j] * (1.0 + 1e-9) + subspace_.rounding_bound();
    if (!is_missed && !is_first) {
      if (certificate_.is_closed()) {
        subspace_.plan_guards(j, certificate_.ritz_vectors(), update.context);
      }
      break;
    }
    subspace_.replace_guards(j, certificate_.ritz_vectors(), update.context);
    sweep(update);
    if (!is_first) {
      // The missed direction is tracked now, so the certificate bounds less than before.
      find_errors(update);
      const bool has_more = certificate_.is_closed() && certificate_.n_above_shared() > j;
      if (tails_.is_good_enough() && !has_more) break;
    }
    is_first = false;
    const Index next = certificate_.is_closed() ? certificate_.n_above_shared()
                                                : subspace_.n_separated(settings_.tolerance);
    if (next == j) break;
    j = next;
  }
  find_errors(update);
}

// If the first W equals W_0, its largest value plus error bounds the norm of W_0.
template <class T>
void DenseTier<T>::initialize_origin(const DenseUpdate<T>& update) {
  if (update.matrix == nullptr || !origin_.is_set()) return;
  const Completeness kind = tails_.tail(0).kind == Completeness::rigorous
                                ? Completeness::rigorous
                                : Completeness::probabilistic;
  const Bound norm{subspace_.reported().values[0] + update.record.errors[0], kind};
  origin_.initialize(*update.matrix, update.squared_norm, norm);
}

// Whether residuals, not the tail, cause the largest error.
template <class T>
bool DenseTier<T>::would_sweep_help() const {
  const Index j = subspace_.n_separated(settings_.tolerance);
  return j > 0 && 4.0 * subspace_.residual(0, j) > tails_.largest_error();
}

template class DenseTier<float>;
template class DenseTier<double>;

}  // namespace dlnfast
