// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/plain.h"
#include "bindings/results.h"
#include "bindings/tensor_view.h"
#include "common/check.h"
#include "common/isa.h"

namespace py = pybind11;

namespace t2p {

namespace attention {
void bind(py::module_& m);
}
namespace group_norm {
void bind(py::module_& m);
}
namespace linear_attention {
void bind(py::module_& m);
}
namespace masked_sampling {
void bind(py::module_& m);
}
namespace mrf {
void bind(py::module_& m);
}
namespace scheduler {
void bind(py::module_& m);
}
namespace vq {
void bind(py::module_& m);
}

namespace {

py::dict build_info() {
  py::list isa_built;
  isa_built.append("scalar");
  if (T2P_X86) {
    isa_built.append("avx2");
    isa_built.append("avx512");
    isa_built.append("avx512_vnni");
    isa_built.append("avx512_bf16");
    isa_built.append("amx");
  }
  py::dict info;
  info["version"] = T2P_VERSION;
#ifdef T2P_CUDA_TOOLKIT
  info["cuda"] = T2P_CUDA_TOOLKIT;
  info["cuda_archs"] = py::str(T2P_CUDA_ARCHS).attr("split")();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
#endif
  info["isa_built"] = isa_built;
  info["isa"] = isa_name(chosen_isa());
  info["tensor_road"] = tensor_road();
  return info;
}

}  // namespace
}  // namespace t2p

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of t2p_fast. Private: call t2p_fast.ops instead.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const t2p::TypeError& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  m.def("init", &t2p::init_tensor_road, py::arg("torch"));
  m.def("build_info", &t2p::build_info);
  t2p::chosen_isa();  // a wrong T2P_ISA is an error of the import, not of the first kernel
  t2p::bind_plain(m);
  t2p::bind_results(m);
  t2p::attention::bind(m);
  t2p::group_norm::bind(m);
  t2p::linear_attention::bind(m);
  t2p::masked_sampling::bind(m);
  t2p::mrf::bind(m);
  t2p::scheduler::bind(m);
  t2p::vq::bind(m);
}
