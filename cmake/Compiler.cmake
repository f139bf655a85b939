# SPDX-License-Identifier: MIT
# Compilers: those that compile the kernels, and how clang-cl is given options of Clang.

# Stops with an explanation if the compiler cannot build what is configured.
function(dlnfast_check_compiler)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "MSVC")
    message(FATAL_ERROR
      "The kernels of dlnfast use vector types of GCC and Clang, which cl does not have. Use clang-cl: install "
      "'C++ Clang tools for Windows' in the Visual Studio Installer, and set the environment variable "
      "CMAKE_GENERATOR_TOOLSET=ClangCL (or CXX=clang-cl, with the generator Ninja).")
  elseif(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    message(FATAL_ERROR
      "The compiler is ${CMAKE_CXX_COMPILER_ID}; dlnfast needs GCC, Clang or clang-cl, because its kernels use "
      "their vector types.")
  elseif(WIN32 AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # https://gcc.gnu.org/bugzilla/show_bug.cgi?id=54412
    message(FATAL_ERROR
      "GCC for Windows keeps AVX vectors on a stack that is aligned to 16 bytes only (GCC bug 54412), so that "
      "the kernels would crash. Use clang-cl, or Clang for MinGW.")
  endif()
  if(DLNFAST_SANITIZE AND WIN32)
    message(FATAL_ERROR "DLNFAST_SANITIZE needs Linux or macOS.")
  endif()
  if(DLNFAST_FUZZ AND NOT (CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_NAME STREQUAL "Linux"))
    message(FATAL_ERROR "DLNFAST_FUZZ needs GCC and Linux.")
  endif()
endfunction()

# Options of GCC and Clang as this compiler takes them: clang-cl hands over what follows /clang:.
function(dlnfast_clang_options out)
  set(options ${ARGN})
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    list(TRANSFORM options PREPEND "/clang:")
  endif()
  set(${out} ${options} PARENT_SCOPE)
endfunction()
