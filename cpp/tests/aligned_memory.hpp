// SPDX-License-Identifier: MIT
// Aligned memory for tests that replace operator new, without the allocators of C++ or Eigen.
#pragma once

#include <cstddef>
#include <cstdlib>

#ifdef _WIN32
#include <malloc.h>
#endif

namespace check {

// Returns memory for aligned_free, or nullptr. The alignment is a power of two, at least that of a pointer.
inline void* aligned_memory(std::size_t size, std::size_t alignment) {
  if (size == 0) size = 1;
#ifdef _WIN32
  return _aligned_malloc(size, alignment);
#else
  void* p = nullptr;
  return posix_memalign(&p, alignment, size) == 0 ? p : nullptr;
#endif
}

inline void aligned_free(void* p) {
#ifdef _WIN32
  _aligned_free(p);
#else
  std::free(p);
#endif
}

}  // namespace check
