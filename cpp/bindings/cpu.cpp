// SPDX-License-Identifier: MIT
// A probe that runs on any processor: which instruction-set levels does this one have? In plain C
// API, because the headers of pybind11 alone would take five seconds to compile.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "processor.hpp"

namespace {

PyObject* to_list(const std::vector<std::string>& names) {
  PyObject* list = PyList_New(0);
  for (const std::string& name : names) {
    PyObject* item = PyUnicode_FromString(name.c_str());
    if (list == nullptr || item == nullptr || PyList_Append(list, item) != 0) Py_CLEAR(list);
    Py_XDECREF(item);
    if (list == nullptr) break;
  }
  return list;
}

PyObject* supported_levels(PyObject*, PyObject*) { return to_list(dlnfast::supported_levels()); }

PyObject* missing_features(PyObject*, PyObject* arguments, PyObject* keywords) {
  const char* level = nullptr;
  static char name[] = "level";
  static char* names[] = {name, nullptr};
  if (PyArg_ParseTupleAndKeywords(arguments, keywords, "s", names, &level) == 0) return nullptr;
  return to_list(dlnfast::missing_features(level));
}

PyMethodDef functions[] = {
    {"supported_levels", supported_levels, METH_NOARGS,
     "supported_levels() -> list[str]\n\nLevels that this processor runs, lowest first."},
    {"missing_features",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(missing_features)),
     METH_VARARGS | METH_KEYWORDS,
     "missing_features(level: str) -> list[str]\n\nFeatures of a level that this processor lacks."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_cpu",
                          "Instruction-set levels of this processor.",
                          0,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModuleDef_Init(&definition); }
