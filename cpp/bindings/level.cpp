// SPDX-License-Identifier: MIT
// The entry of a module of one instruction-set level: that of the bindings, which know no level, under the
// name that Python looks for.
extern "C" __attribute__((visibility("hidden"))) void* PyInit_bindings();
extern "C" __attribute__((visibility("default"))) void* DLNFAST_ENTRY();

void* DLNFAST_ENTRY() { return PyInit_bindings(); }
