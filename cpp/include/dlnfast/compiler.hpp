// SPDX-License-Identifier: MIT
// Attributes and pragmas that GCC, Clang and clang-cl have in common.
#pragma once

#if !defined(__GNUC__) && !defined(__clang__)
#error "dlnfast needs the vector types of GCC or Clang; on Windows, compile with clang-cl"
#endif

// For functions and lambdas whose arguments must stay in registers.
#define DLNFAST_INLINE __attribute__((always_inline))

// For functions that would take registers away from the loops around their calls.
#define DLNFAST_NOINLINE __attribute__((noinline))

// Placed before a loop of constant bounds, up to 32 iterations: unrolls it early enough that arrays
// indexed by it stay in registers.
#define DLNFAST_UNROLL _Pragma("GCC unroll 32")
