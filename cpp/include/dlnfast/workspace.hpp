// SPDX-License-Identifier: MIT
// Scratch memory that is reused from call to call.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "dlnfast/types.hpp"

namespace dlnfast {

// One growing block. Each `reserve` invalidates the memory of the previous one.
class Workspace {
 public:
  template <class T>
  T* reserve(Index n) {
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(T);
    if (bytes > size_) {
      block_.reset();
      size_ = 0;
      block_.reset(static_cast<std::byte*>(::operator new(bytes, alignment)));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(block_.get());
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, alignment); }
  };

  std::unique_ptr<std::byte, Free> block_;
  std::size_t size_ = 0;
};

}  // namespace dlnfast
