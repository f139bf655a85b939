# SPDX-License-Identifier: MIT
# Instruction-set levels: which ones are built, and with which flags.
include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)
include(Compiler)

# All levels of the architecture that is compiled for, lowest first. A build for several architectures
# (CMAKE_OSX_ARCHITECTURES) has the baseline of each.
function(dlnfast_architecture_levels out)
  check_cxx_source_compiles("#ifndef __x86_64__\n#error\n#endif\nint main() {}" DLNFAST_IS_X86_64)
  if(DLNFAST_IS_X86_64)
    set(${out} baseline v3 v4 PARENT_SCOPE)
  else()
    set(${out} baseline PARENT_SCOPE)
  endif()
endfunction()

# The highest level of the processor of this machine that the compiler knows, empty if the program that
# asks the processor cannot run. It runs in every configuration: a build folder may have come from another
# machine.
function(dlnfast_processor_level out)
  set(candidates v4 v3)
  set(lower_levels v3 baseline)
  set(${out} "" PARENT_SCOPE)
  if(CMAKE_CROSSCOMPILING)
    return()
  endif()
  try_run(status is_compiled
    SOURCES "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/processor_level.cpp"
    NO_CACHE
    CXX_STANDARD 17
    RUN_OUTPUT_VARIABLE level)
  if(NOT is_compiled OR NOT status STREQUAL "0" OR NOT level MATCHES "^(baseline|v3|v4)$")
    return()
  endif()
  # An older compiler, or one that compiles for several architectures, takes the next lower level.
  foreach(candidate lower IN ZIP_LISTS candidates lower_levels)
    if(level STREQUAL candidate)
      dlnfast_level_flags(flags ${candidate})
      check_cxx_compiler_flag(${flags} DLNFAST_COMPILER_HAS_${candidate})
      if(NOT DLNFAST_COMPILER_HAS_${candidate})
        message(STATUS "This compiler has no -march=x86-64-${candidate}: ${lower} is used")
        set(level ${lower})
      endif()
    endif()
  endforeach()
  set(${out} ${level} PARENT_SCOPE)
endfunction()

# The levels of this build, lowest first.
function(dlnfast_levels out)
  if(DLNFAST_SIMD STREQUAL "native")
    dlnfast_processor_level(levels)
    if(levels)
      message(STATUS "Instruction-set level of this machine: ${levels}")
    else()
      message(STATUS "The processor that will run dlnfast is not known: all levels are built")
    endif()
  elseif(NOT DLNFAST_SIMD STREQUAL "dispatch")
    set(levels ${DLNFAST_SIMD})
  endif()
  if(NOT levels)
    dlnfast_architecture_levels(levels)
  endif()
  set(${out} ${levels} PARENT_SCOPE)
endfunction()

# The level of programs that have only one: that of the build, or of this machine if the build has several.
function(dlnfast_single_level out)
  set(levels ${ARGN})
  list(LENGTH levels n_levels)
  if(n_levels GREATER 1)
    dlnfast_processor_level(processor_level)
    if(processor_level)
      set(levels ${processor_level})
    endif()
  endif()
  list(GET levels 0 level)
  set(${out} ${level} PARENT_SCOPE)
endfunction()

function(dlnfast_level_flags out level)
  if(level STREQUAL "v3" OR level STREQUAL "v4")
    dlnfast_clang_options(flags -march=x86-64-${level})
    set(${out} ${flags} PARENT_SCOPE)
  elseif(level STREQUAL "baseline")
    set(${out} "" PARENT_SCOPE)
  else()
    message(FATAL_ERROR "DLNFAST_SIMD is '${level}'; wanted native, dispatch, baseline, v3 or v4")
  endif()
endfunction()
