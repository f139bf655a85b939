// SPDX-License-Identifier: MIT
#include "cache_size.hpp"

#include <algorithm>
#include <vector>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <unistd.h>
#endif

namespace dlnfast {
namespace {

// Returns what the operating system reports, 0 if it reports nothing.
Index reported_bytes() {
#if defined(_WIN32)
  DWORD size = 0;
  GetLogicalProcessorInformation(nullptr, &size);  // fails, and sets the size
  std::vector<SYSTEM_LOGICAL_PROCESSOR_INFORMATION> entries(size / sizeof entries[0]);
  if (entries.empty() || !GetLogicalProcessorInformation(entries.data(), &size)) return 0;
  for (const auto& entry : entries) {
    if (entry.Relationship == RelationCache && entry.Cache.Level == 2) return entry.Cache.Size;
  }
  return 0;
#elif defined(_SC_LEVEL2_CACHE_SIZE)
  return static_cast<Index>(sysconf(_SC_LEVEL2_CACHE_SIZE));
#else
  return 0;
#endif
}

}  // namespace

Index second_level_cache() {
  static const Index bytes = reported_bytes();
  return bytes > 0 ? std::clamp<Index>(bytes, Index(256) << 10, Index(2) << 20) : Index(512) << 10;
}

}  // namespace dlnfast
