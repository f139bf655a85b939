// Vectors of the instruction set that this translation unit is compiled for (GCC and Clang).
#pragma once

#include <cstring>

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
  static T sum(const Vector& v) {
    T total = v[0];
    for (int i = 1; i < size; ++i) total += v[i];
    return total;
  }
};

}  // namespace dlnfast::simd
