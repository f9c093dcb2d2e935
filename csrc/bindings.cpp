// vqfast._C: facts about this build, for `vqfast doctor`. No tensor passes through here; vqfast works without it.
#include <pybind11/pybind11.h>

#include "build_facts.h"  // written by setup.py

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this build of vqfast.";
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["compiler"] = VQFAST_COMPILER;
    facts["flags"] = VQFAST_FLAGS;
    facts["torch"] = VQFAST_TORCH;
    facts["torch_target"] = VQFAST_TORCH_TARGET;
    facts["levels"] = pybind11::str(VQFAST_LEVELS).attr("split")(",");
    return facts;
  }, "Compiler, flags, torch at build time, oldest torch that is promised, and the CPU levels that were compiled in.");
}
