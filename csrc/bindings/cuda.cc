// urm_kernels._cuda: imports without a driver and says what is missing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cuda/device.h"
#include "../cuda/launch.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of urm_kernels; use the package, not this module.";
  m.def(
      "report",
      [] {
        const urm::CudaReport report = urm::cuda_report();
        return py::make_tuple(report.runtime_version, report.driver_version, report.devices, report.problem);
      },
      "(runtime version, driver version, devices, problem or '').");
  m.def(
      "read_bandwidth",
      [](uintptr_t data, int64_t count, uintptr_t stream) {
        const py::gil_scoped_release released;
        return urm::cuda_read_bandwidth(data, count, stream);
      },
      "Bytes a second of one read of `count` floats at a device address.");
  m.def(
      "byte_products",
      [](int64_t steps, uintptr_t stream) {
        const py::gil_scoped_release released;
        return urm::cuda_byte_products(steps, stream);
      },
      "Operations a second of products of bytes on the tensor cores, `steps` times eight a warp.");
  m.def(
      "launch",
      [](const std::string& name, int64_t blocks, int64_t rows, int64_t threads, int64_t shared_bytes, uintptr_t stream,
         const std::vector<std::vector<int64_t>>& arguments) {
        const py::gil_scoped_release released;
        urm::launch(name, {blocks, rows, threads, shared_bytes, stream}, arguments);
      },
      "Runs a kernel of csrc/cuda/kernels.h on the current device; see urm_kernels.backends.cuda.launching.");
}
