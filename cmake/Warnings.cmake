# SPDX-License-Identifier: MIT
function(dlnfast_warnings target)
  if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
    target_compile_options(${target} PRIVATE /W4)  # -Wall -Wextra; its -Wall is -Weverything
  else()
    target_compile_options(${target} PRIVATE -Wall -Wextra -Wpedantic)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # What is in an anonymous namespace stays in one unit, though it is not the main file of it.
    target_compile_options(${target} PRIVATE -Wno-subobject-linkage)
    # GCC 12 reports hundreds of false ones from its own AVX-512 header, more with sanitizers.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
endfunction()
