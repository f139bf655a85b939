// SPDX-License-Identifier: MIT
// The entry of a module of one instruction-set level: that of the bindings, which know no level, under the
// name that Python looks for.
#ifdef _WIN32
#define DLNFAST_EXPORTED __declspec(dllexport)
#define DLNFAST_HIDDEN
#else
#define DLNFAST_EXPORTED __attribute__((visibility("default")))
#define DLNFAST_HIDDEN __attribute__((visibility("hidden")))
#endif

extern "C" DLNFAST_HIDDEN void* PyInit_bindings();
extern "C" DLNFAST_EXPORTED void* DLNFAST_ENTRY();

void* DLNFAST_ENTRY() { return PyInit_bindings(); }
