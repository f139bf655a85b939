// SPDX-License-Identifier: MIT
// Records of a tracker's updates: values, gaps, and branches that connect them from update to
// update (branches.hpp).
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "dlnfast/branches.hpp"
#include "dlnfast/svd_tracker.hpp"
#include "subspace_iteration.hpp"

namespace dlnfast {

template <class T>
class TrackerRecording {
 public:
  using Clock = std::chrono::steady_clock;

  // `subspace` must outlive the recording.
  TrackerRecording(const TrackerSettings& settings, SubspaceIteration<T>& subspace)
      : settings_(settings),
        subspace_(subspace),
        branches_(settings.branches),
        frame_branches_(settings.branches) {}

  const TrackerRecord& record() const { return record_; }
  TrackerRecord& record() { return record_; }
  // Number of finished updates.
  std::int64_t count() const { return count_; }

  // Clears the record for an update that began at `start`. `squared_norm` is that of W; negative if
  // unknown.
  void start_record(double squared_norm, Clock::time_point start);

  // Completes the record from the reported pairs. `drift` is the accumulated drift to report.
  // Values further apart than `max_distance` never belong to one branch.
  void finish(double drift, double max_distance, const Context& context);
  // The same for vectors (rows) in the coordinates of frames, and for values without vectors.
  void finish_in_frames(MatrixRef<double> left, MatrixRef<double> right, const Context& context);
  void finish_values(double drift);

  // Continues the branches of the frames with the reported vectors, which are now at full length.
  void leave_frames();

  void set_reference();
  void set_reference(MatrixRef<const T> left, MatrixRef<const T> right);

  // Whether there are reported vectors; a failed update leaves none.
  bool has_vectors() const { return has_vectors_; }
  void discard_vectors() { has_vectors_ = false; }

 private:
  std::vector<double> all_errors() const;
  template <class S>
  void follow(Branches<S>& branches, double max_distance, MatrixRef<S> left, MatrixRef<S> right,
              const Context& context);
  void complete(double drift);

  TrackerSettings settings_;
  SubspaceIteration<T>& subspace_;
  TrackerRecord record_;
  std::int64_t count_ = 0;
  Clock::time_point start_;
  Branches<T> branches_;
  Branches<double> frame_branches_;
  bool has_vectors_ = false;
};

extern template class TrackerRecording<float>;
extern template class TrackerRecording<double>;

}  // namespace dlnfast
