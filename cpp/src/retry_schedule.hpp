// SPDX-License-Identifier: MIT
// When to try something again that may not help: at once while it helps, then 1, 3, 7, .. 63 updates later.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlnfast {

class RetrySchedule {
 public:
  bool is_due(std::int64_t number) const { return number >= due_; }
  // Reports the attempt of update `number`.
  void report(bool helped, std::int64_t number) {
    interval_ = helped ? 0 : std::min<std::int64_t>(2 * interval_ + 1, 63);
    due_ = number + interval_;
  }

 private:
  std::int64_t due_ = 0, interval_ = 0;
};

}  // namespace dlnfast
