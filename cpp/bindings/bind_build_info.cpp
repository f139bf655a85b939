// SPDX-License-Identifier: MIT
#include "bindings.hpp"
#include "dlnfast/build_info.hpp"
#include "dlnfast/threads.hpp"

namespace dlnfast::python {

namespace py = pybind11;

void bind_build_info(py::module_& m) {
  m.def(
      "build_info",
      [] {
        const BuildInfo info = build_info();
        py::dict result;
        result["version"] = info.version;
        result["level"] = info.level;
        result["compiler"] = info.compiler;
        result["eigen"] = info.eigen;
        result["openmp"] = info.openmp;
        result["vector_bytes"] = info.vector_bytes;
        result["max_threads"] = max_threads();
        return result;
      },
      "How this module was built.");
  m.def("set_num_threads", &set_num_threads, py::arg("n"), "Default team size; 0: OpenMP's own.");
  m.def("max_threads", &max_threads, "Team size of a call that asks for 0 threads.");
  m.def("forbid_threads", &forbid_threads, "One thread from here on (in a forked child).");
}

}  // namespace dlnfast::python
