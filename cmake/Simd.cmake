# SPDX-License-Identifier: MIT
# Instruction-set levels: which ones are built, and with which flags.

# The levels of this build, lowest first.
function(dlnfast_levels out)
  if(NOT DLNFAST_SIMD STREQUAL "dispatch")
    set(${out} ${DLNFAST_SIMD} PARENT_SCOPE)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    set(${out} baseline v3 v4 PARENT_SCOPE)
  else()
    set(${out} baseline PARENT_SCOPE)
  endif()
endfunction()

function(dlnfast_level_flags out level)
  if(level STREQUAL "native")
    # GCC tunes for the wrong processor where it does not know this one: generic tuning is faster.
    set(${out} -march=native -mtune=generic PARENT_SCOPE)
  elseif(level STREQUAL "v3" OR level STREQUAL "v4")
    set(${out} -march=x86-64-${level} PARENT_SCOPE)
  elseif(level STREQUAL "baseline")
    set(${out} PARENT_SCOPE)
  else()
    message(FATAL_ERROR "DLNFAST_SIMD is '${level}'; wanted dispatch, native, baseline, v3 or v4")
  endif()
endfunction()
