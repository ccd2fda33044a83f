// Calls: the function mode of a capture, for the calls that it knows.

#pragma once

#include <pybind11/pybind11.h>

namespace dropinf {

// Adds the type `Calls` to the module.
//
// Calls(closing, table, known, special, describing, tap, probe, froze): what torch calls for every
// function while a capture is open, in place of the method of a TorchFunctionMode. A function that
// is given nothing of `known`, a dictionary by the id of a tensor, is run as it is, and so is one
// of `describing`. A call that is in the table is run with detached copies of its parameters, and
// its result gets a SiteNode. Every other call goes to closing.called(func, args, kwargs), and one
// of a function in `special` that is given nothing known to closing.noted(func, args, kwargs).
void init_calls(pybind11::module_& m);

}  // namespace dropinf
