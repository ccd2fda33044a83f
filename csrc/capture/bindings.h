// What Python sees of the C++ side of a capture.

#pragma once

#include <pybind11/pybind11.h>

namespace dropinf {

void init_capture(pybind11::module_& m);

}  // namespace dropinf
