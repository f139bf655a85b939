// SPDX-License-Identifier: MIT
// Additions to an extension module that is built for fuzzing (DLNFAST_FUZZ): coverage counters in
// libFuzzer's format, and allocations that fail on request.
//
// GCC calls __sanitizer_cov_trace_pc at every basic block; its return address identifies the block.
// The module is linked with --wrap=malloc and -Bsymbolic-functions, so that its own allocations,
// and only these, go through this file.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#define DLNFAST_UNTRACED __attribute__((no_sanitize_coverage, no_sanitize("address", "undefined")))
#define DLNFAST_EXPORTED extern "C" __attribute__((visibility("default"))) DLNFAST_UNTRACED

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" void* __real_malloc(std::size_t size);

namespace {

constexpr int bits = 17;
constexpr std::size_t n_counters = std::size_t{1} << bits;

struct Block {
  std::uintptr_t address;
  std::uintptr_t flags;
};

std::uint8_t counters[n_counters];  // of the current call; libFuzzer clears them
std::uint8_t reached[n_counters];   // by any call
Block blocks[n_counters];

std::atomic<long> n_successes{-1};  // allocations before the failing one; negative: none fails
std::atomic<std::size_t> least_size{0};

}  // namespace

// Concurrent threads may lose counts, but not the fact that a block was reached.
extern "C" DLNFAST_UNTRACED void __sanitizer_cov_trace_pc() {
  const auto address = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
  const auto offset =
      static_cast<std::uint32_t>(address - reinterpret_cast<std::uintptr_t>(__ehdr_start));
  const std::uint32_t i = (offset * 2654435769u) >> (32 - bits);
  if (counters[i] < 255) ++counters[i];
  reached[i] = 1;
}

// Registers the counters with libFuzzer, by its functions __sanitizer_cov_8bit_counters_init and
// _pcs_init.
DLNFAST_EXPORTED void dlnfast_register_counters(void (*counters_init)(std::uint8_t*, std::uint8_t*),
                                                void (*blocks_init)(const void*, const void*)) {
  for (std::size_t i = 0; i < n_counters; ++i) blocks[i] = {i + 1, 0};
  counters_init(counters, counters + n_counters);
  blocks_init(blocks, blocks + n_counters);
}

DLNFAST_EXPORTED int dlnfast_n_reached() {
  int n = 0;
  for (const std::uint8_t block : reached) n += block;
  return n;
}

// Lets the allocation after `n` further ones fail, once. Only allocations of at least `size` bytes
// count. A negative n cancels the request. Returns the remaining count of the previous request:
// negative if its allocation failed.
DLNFAST_EXPORTED long dlnfast_fail_allocation(long n, std::size_t size) {
  least_size = size;
  return n_successes.exchange(n);
}

extern "C" DLNFAST_UNTRACED void* __wrap_malloc(std::size_t size) {
  if (n_successes >= 0 && size >= least_size && n_successes-- == 0) return nullptr;
  return __real_malloc(size);
}

// AddressSanitizer's operator new terminates the process when memory is exhausted; this one throws.
DLNFAST_UNTRACED void* operator new(std::size_t size) {
  void* memory = std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](std::size_t size) { return operator new(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return std::malloc(size > 0 ? size : 1);
}
void* operator new[](std::size_t size, const std::nothrow_t& tag) noexcept {
  return operator new(size, tag);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
