// SPDX-License-Identifier: MIT
// SIMD vectors of the instruction set of this translation unit (GCC, Clang and clang-cl).
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "dlnfast/compiler.hpp"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace dlnfast::simd {

#if defined(__AVX512F__)
inline constexpr int vector_bytes = 64;
inline constexpr int n_registers = 32;
#elif defined(__AVX__)
inline constexpr int vector_bytes = 32;
inline constexpr int n_registers = 16;
#elif defined(__aarch64__)
inline constexpr int vector_bytes = 16;
inline constexpr int n_registers = 32;
#else
inline constexpr int vector_bytes = 16;
inline constexpr int n_registers = 16;
#endif

template <class T, int Bytes = vector_bytes>
struct Pack {
  typedef T Vector __attribute__((vector_size(Bytes)));
  static constexpr int size = Bytes / static_cast<int>(sizeof(T));

  static Vector load(const T* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(T* p, const Vector& v) { std::memcpy(p, &v, sizeof v); }

  static Vector broadcast(T x) { return x - Vector{}; }

  // Loads or stores the first n entries, 0 < n < size. Loading sets the others to zero; storing
  // leaves them unchanged.
  static Vector load_part(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && size == 8) {
      return (Vector)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
    } else if constexpr (Bytes == 64) {
      return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
    }
#endif
    Vector v = {};
    std::memcpy(&v, p, n * sizeof(T));
    return v;
  }
  static void store_part(T* p, const Vector& v, int n) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && size == 8) {
      return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
    } else if constexpr (Bytes == 64) {
      return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
    }
#endif
    std::memcpy(p, &v, n * sizeof(T));
  }
  // Returns the first n entries of v; the others become zero, also if they are NaN.
  static Vector first(const Vector& v, int n) {
    using Lane = std::conditional_t<sizeof(T) == 8, long long, int>;
    typedef Lane Lanes __attribute__((vector_size(Bytes)));
    Lanes lane{};
    for (int i = 0; i < size; ++i) lane[i] = i;
    return (Vector)((Lanes)v & (Lanes)(lane < static_cast<Lane>(n)));
  }
  // Adds the halves of the vector recursively.
  static T sum(const Vector& v) {
    if constexpr (Bytes > 16) {
      typename Pack<T, Bytes / 2>::Vector half[2];
      std::memcpy(half, &v, sizeof v);
      return Pack<T, Bytes / 2>::sum(half[0] + half[1]);
    }
    T total = v[0];
    for (int i = 1; i < size; ++i) total += v[i];
    return total;
  }
};

// Returns entries lane[0], lane[1], .. of the 2 n entries of a and b.
template <int... lane, class Vector>
DLNFAST_INLINE inline Vector shuffle(const Vector& a, const Vector& b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lane...);
#else
  using Lane = std::conditional_t<sizeof(a[0]) == 8, long long, int>;
  typedef Lane Lanes __attribute__((vector_size(sizeof(Vector))));
  return __builtin_shuffle(a, b, Lanes{lane...});
#endif
}

template <class Body, int... I>
DLNFAST_INLINE inline void unroll(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(0), .. body(n - 1) with compile-time constants. Unlike a loop, this always unrolls, so
// that arrays with these indices stay in registers.
template <int n, class Body>
DLNFAST_INLINE inline void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, n>{});
}

template <int half, class Vector, int... lane>
DLNFAST_INLINE inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  const Vector first = shuffle<((lane & half) == 0 ? lane : n + lane - half)...>(a, b);
  b = shuffle<((lane & half) == 0 ? lane + half : n + lane)...>(a, b);
  a = first;
}

// Transposes a P::size x P::size block in place, by recursively exchanging smaller blocks.
template <class P, int half = P::size / 2>
DLNFAST_INLINE inline void transpose(typename P::Vector (&v)[P::size]) {
  if constexpr (half > 0) {
    unroll<P::size>([&](auto i) DLNFAST_INLINE {
      if constexpr ((i & half) == 0) {
        exchange<half>(v[i], v[i + half], std::make_integer_sequence<int, P::size>{});
      }
    });
    transpose<P, half / 2>(v);
  }
}

template <int half, class Vector, int... lane>
DLNFAST_INLINE inline Vector add_crosswise(const Vector& a, const Vector& b,
                                           std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  return shuffle<((lane & half) == 0 ? lane : n + lane)...>(a, b) +
         shuffle<((lane & half) == 0 ? lane + half : n + lane - half)...>(a, b);
}

// Returns the sums of P::size vectors, one in each lane. Overwrites the vectors.
template <class P, int half = 1>
DLNFAST_INLINE inline typename P::Vector sums(typename P::Vector (&v)[P::size]) {
  if constexpr (half < P::size) {
    unroll<P::size / (2 * half)>([&](auto i) DLNFAST_INLINE {
      constexpr int first = 2 * half * i;
      v[first] = add_crosswise<half>(v[first], v[first + half],
                                     std::make_integer_sequence<int, P::size>{});
    });
    return sums<P, 2 * half>(v);
  }
  return v[0];
}

// Forces a value into a register; GCC would reload it for every use.
template <class Vector>
DLNFAST_INLINE inline void hold_in_register([[maybe_unused]] Vector& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
}

}  // namespace dlnfast::simd
