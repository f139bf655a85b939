// SPDX-License-Identifier: MIT
// Prints the highest instruction-set level of the machine that builds (Simd.cmake).
#include <cstdio>

#include "../cpp/bindings/processor.hpp"

int main() { std::printf("%s", dlnfast::supported_levels().back().c_str()); }
