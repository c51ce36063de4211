// urm_kernels._cpu: addresses, sizes and strides in, nothing of torch. The GIL is released while kernels run.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>

#include "../cpu/candidates.h"
#include "../cpu/ceilings.h"
#include "../cpu/encode.h"
#include "../cpu/explore.h"
#include "../cpu/large_pages.h"
#include "../cpu/partition_gradient.h"
#include "../cpu/rows.h"
#include "../cpu/scan.h"
#include "../cpu/upper_bounds.h"

namespace py = pybind11;

namespace {

constexpr int kMostThreads = 4096;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

unsigned long main_thread = 0;

void find_main_thread() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  // The thread that forks is the child's main thread.
  pthread_atfork(nullptr, nullptr, [] { main_thread = PyThread_get_thread_ident(); });
}

py::list instruction_sets() {
  int count;
  const urm::Kernels* const* tables = urm::usable_kernels(&count);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(tables[i]->name);
  return names;
}

// Settings are read here at every call: getenv costs a tenth of a look-up in os.environ, which writes through to it.
const urm::Kernels& chosen_kernels() {
  const char* wanted = std::getenv("URM_CPU_ISA");
  if (const urm::Kernels* kernels = urm::find_kernels(wanted ? wanted : "")) return *kernels;
  std::string usable = py::str(py::str(", ").attr("join")(instruction_sets()));
  throw py::value_error("URM_CPU_ISA: one of " + usable + " is usable here, '" + wanted + "' came");
}

const char* wanted_threads() {
  const char* wanted = std::getenv("URM_NUM_THREADS");
  return wanted && *wanted ? wanted : nullptr;
}

int chosen_threads(int torch_threads) {
  const char* wanted = wanted_threads();
  if (!wanted) return torch_threads;
  char* end;
  const long threads = std::strtol(wanted, &end, 10);
  if (*end || threads < 1 || threads > kMostThreads)
    throw py::value_error("URM_NUM_THREADS: an integer from 1 to " + std::to_string(kMostThreads) + " is wanted, '" +
                          wanted + "' came");
  return static_cast<int>(threads);
}

urm::ScanMode chosen_scan(const urm::Kernels& kernels, bool coded) {
  const char* wanted = std::getenv("URM_CPU_SCAN");
  const std::string name = wanted && *wanted ? wanted : "auto";
  if (name == "auto") return urm::ScanMode::kAuto;
  if (name == "exact") return urm::ScanMode::kExact;
  if (name == "bounded" && (kernels.cheap || coded)) return urm::ScanMode::kBounded;
  if (name == "bounded")
    throw py::value_error(std::string("URM_CPU_SCAN: bounded is not possible with the instruction set ") +
                          kernels.name +
                          ", which has no cheap score, and a table that is not packed; use auto or exact");
  throw py::value_error("URM_CPU_SCAN: one of auto, exact, bounded is wanted, '" + name + "' came");
}

using Matrix = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;  // address, dtype, sizes, strides

urm::MatrixView view(const Matrix& m) {
  return {at<void>(std::get<0>(m)), static_cast<urm::DType>(std::get<1>(m)),
          std::get<2>(m),           std::get<3>(m),
          std::get<4>(m),           std::get<5>(m)};
}

urm::MatrixView view(const std::optional<Matrix>& m) {
  return m ? view(*m) : urm::MatrixView{};
}

using Queries = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;  // address, exists, users, queries, r

urm::QueriesView view(const Queries& q) {
  return {at<float>(std::get<0>(q)), at<uint8_t>(std::get<1>(q)), std::get<2>(q), std::get<3>(q), std::get<4>(q)};
}

// rows, count, items, bias, row scale
using Overlay = std::tuple<uintptr_t, int64_t, Matrix, std::optional<Matrix>, std::optional<Matrix>>;

urm::Overlay view(const Overlay& o) {
  urm::Overlay overlay;
  overlay.rows = at<int64_t>(std::get<0>(o));
  overlay.count = std::get<1>(o);
  overlay.items = view(std::get<2>(o));
  overlay.bias = view(std::get<3>(o));
  overlay.row_scale = view(std::get<4>(o));
  return overlay;
}

// signs, r, steps
using RotationSpec = std::tuple<uintptr_t, int64_t, int64_t>;

urm::Rotation view(const RotationSpec& spec) {
  urm::Rotation rotation;
  rotation.signs = at<float>(std::get<0>(spec));
  rotation.r = std::get<1>(spec);
  rotation.p = urm::hadamard_size(rotation.r);
  rotation.steps = std::get<2>(spec);
  return rotation;
}

// order and bias of the codes; rows of a cell, their number, codes, references of lost and norm, bias
using Cells = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, float, float, uintptr_t>;

// bits, blocks, their number, fine codes, rotation, references of lost and norm, shares of the slack, cells
using Codes =
    std::tuple<int, uintptr_t, int64_t, uintptr_t, RotationSpec, float, float, float, float, std::optional<Cells>>;

urm::Codes view(const Codes& c) {
  urm::Codes codes;
  codes.bits = std::get<0>(c);
  codes.blocks = at<char>(std::get<1>(c));
  codes.count = std::get<2>(c);
  codes.fine = at<char>(std::get<3>(c));
  codes.rotation = view(std::get<4>(c));
  codes.lost_reference = std::get<5>(c);
  codes.norm_reference = std::get<6>(c);
  codes.slack = std::get<7>(c);
  codes.fine_slack = std::get<8>(c);
  if (const auto& cells = std::get<9>(c)) {
    codes.order = at<urm::Placed>(std::get<0>(*cells));
    codes.bias = at<float>(std::get<1>(*cells));
    codes.cells.rows = std::get<2>(*cells);
    codes.cells.count = std::get<3>(*cells);
    codes.cells.blocks = at<char>(std::get<4>(*cells));
    codes.cells.lost_reference = std::get<5>(*cells);
    codes.cells.norm_reference = std::get<6>(*cells);
    codes.cells.bias = at<float>(std::get<7>(*cells));
  }
  return codes;
}

// items, bias, row scale, overlay, bits of the rows that have not been removed, codes
using Table = std::tuple<Matrix, std::optional<Matrix>, std::optional<Matrix>, std::optional<Overlay>, uintptr_t,
                         std::optional<Codes>>;

void set_request(const Queries& queries, const Table& table, int reduce, int torch_threads, urm::Request& request) {
  request.queries = view(queries);
  request.items = view(std::get<0>(table));
  request.bias = view(std::get<1>(table));
  request.row_scale = view(std::get<2>(table));
  if (const auto& overlay = std::get<3>(table)) request.overlay = view(*overlay);
  request.reduce = static_cast<urm::Reduce>(reduce);
  request.threads = chosen_threads(torch_threads);
  request.kernels = &chosen_kernels();
}

// Kind, mask, its strides of users and rows, exclusions, their number; none where every row is allowed.
using FilterSpec = std::optional<std::tuple<int, uintptr_t, int64_t, int64_t, uintptr_t, int64_t>>;

// `scan`, where it is given, whatever the environment says.
void set_scan(const Queries& queries, const Table& table, int reduce, const FilterSpec& filter, int torch_threads,
              urm::ScanRequest& request, std::optional<urm::ScanMode> scan = std::nullopt) {
  set_request(queries, table, reduce, torch_threads, request);
  if (filter) {
    request.filter.kind = static_cast<urm::MaskKind>(std::get<0>(*filter));
    request.filter.mask = at<uint8_t>(std::get<1>(*filter));
    request.filter.mask_user_stride = std::get<2>(*filter);
    request.filter.mask_row_stride = std::get<3>(*filter);
    request.filter.exclude = at<int64_t>(std::get<4>(*filter));
    request.filter.exclude_count = std::get<5>(*filter);
  }
  request.filter.alive = at<uint8_t>(std::get<4>(table));
  if (const auto& codes = std::get<5>(table)) request.codes = view(*codes);
  request.all_threads = wanted_threads() != nullptr;
  request.scan = scan ? *scan : chosen_scan(*request.kernels, request.codes.bits != 0);
}

// Runs `scan` without the GIL; Ctrl-C ends it.
template <class Request>
void run(bool (*scan)(const Request&), Request& request) {
  using Clock = std::chrono::steady_clock;
  auto asked = Clock::now();
  bool signalled = false;
  // Python runs signal handlers on the main thread only; the others, which may outlive the interpreter, leave its lock
  // be.
  if (PyThread_get_thread_ident() == main_thread)
    request.interrupted = [&] {
      if (signalled || Clock::now() - asked < std::chrono::milliseconds(50)) return signalled;
      asked = Clock::now();
      const py::gil_scoped_acquire gil;
      return signalled = PyErr_CheckSignals() != 0;
    };
  {
    const py::gil_scoped_release released;
    scan(request);
  }
  if (signalled) throw py::error_already_set();
}

void score_topk(const Queries& queries, const Table& table, int reduce, const FilterSpec& filter, int64_t k,
                bool sorted, int torch_threads, uintptr_t scores, uintptr_t ids, uintptr_t counts, uintptr_t proven) {
  urm::TopKRequest request;
  set_scan(queries, table, reduce, filter, torch_threads, request);
  request.counts = at<urm::ScanCounts>(counts);
  request.k = k;
  request.sorted = sorted;
  request.scores = at<float>(scores);
  request.ids = at<int64_t>(ids);
  request.proven = at<uint8_t>(proven);
  run(&urm::scan_topk, request);
}

// For the library itself, whatever way to scan the environment names.
void nearest(const Queries& queries, const Table& table, int64_t k, int torch_threads, uintptr_t scores,
             uintptr_t ids) {
  urm::TopKRequest request;
  set_scan(queries, table, static_cast<int>(urm::Reduce::kMax), {}, torch_threads, request, urm::ScanMode::kAuto);
  request.k = k;
  request.scores = at<float>(scores);
  request.ids = at<int64_t>(ids);
  run(&urm::scan_topk, request);
}

void log_partition(const Queries& queries, const Table& table, int reduce, const FilterSpec& filter, float temperature,
                   int torch_threads, uintptr_t out) {
  urm::PartitionRequest request;
  set_scan(queries, table, reduce, filter, torch_threads, request);
  request.temperature = temperature;
  request.out = at<float>(out);
  run(&urm::scan_partition, request);
}

// The gradient of the temperature is returned; the others are written, where an address is given.
double log_partition_backward(const Queries& queries, const Table& table, int reduce, const FilterSpec& filter,
                              float temperature, int torch_threads, uintptr_t logarithms, uintptr_t grad,
                              uintptr_t grad_queries, uintptr_t grad_items, uintptr_t grad_bias) {
  urm::PartitionGradientRequest request;
  set_scan(queries, table, reduce, filter, torch_threads, request);
  request.scan = urm::ScanMode::kExact;
  request.temperature = temperature;
  request.logarithms = at<float>(logarithms);
  request.grad = at<float>(grad);
  request.grad_queries = at<float>(grad_queries);
  request.grad_items = at<float>(grad_items);
  request.grad_bias = at<float>(grad_bias);
  double grad_temperature = 0;
  request.grad_temperature = &grad_temperature;
  run(&urm::partition_gradient, request);
  return grad_temperature;
}

void score_candidates(const Queries& queries, const Table& table, int reduce, uintptr_t candidates, int64_t count,
                      bool shared, bool reduced, int torch_threads, uintptr_t out) {
  urm::CandidatesRequest request;
  set_request(queries, table, reduce, torch_threads, request);
  request.alive = at<uint8_t>(std::get<4>(table));
  request.candidates = at<int64_t>(candidates);
  request.count = count;
  request.shared = shared;
  const py::gil_scoped_release released;
  if (reduced) urm::score_candidates(request, at<float>(out));
  else urm::candidate_dots(request, at<float>(out));
}

// address, whether int64, degree
using Graph = std::tuple<uintptr_t, bool, int64_t>;

void explore_topk(const Queries& queries, const Table& table, int reduce, const FilterSpec& filter, const Graph& graph,
                  int64_t first, const std::vector<int64_t>& widths, float temperature, int64_t seed, uintptr_t streams,
                  int64_t k, int torch_threads, uintptr_t scores, uintptr_t ids, uintptr_t scored) {
  urm::ExploreRequest request;
  set_scan(queries, table, reduce, filter, torch_threads, request);
  std::tie(std::ignore, request.wide, request.degree) = graph;
  request.neighbors = at<void>(std::get<0>(graph));
  request.first = first;
  request.widths = widths;
  request.temperature = temperature;
  request.seed = static_cast<uint64_t>(seed);
  request.streams = at<int64_t>(streams);
  request.k = k;
  request.scores = at<float>(scores);
  request.ids = at<int64_t>(ids);
  request.scored = at<int64_t>(scored);
  run(&urm::explore_topk, request);
}

urm::EncodeRequest encoding(const Matrix& items, const std::optional<Matrix>& row_scale, const RotationSpec& rotation,
                            int bits, uintptr_t blocks, uintptr_t fine) {
  urm::EncodeRequest request;
  request.items = view(items);
  request.row_scale = view(row_scale);
  request.rotation = view(rotation);
  request.bits = bits;
  request.blocks = at<char>(blocks);
  request.fine = at<char>(fine);
  request.kernels = &chosen_kernels();
  return request;
}

void encode_blocks(const Matrix& items, const std::optional<Matrix>& row_scale, const RotationSpec& rotation, int bits,
                   uintptr_t blocks, uintptr_t fine, int torch_threads) {
  urm::EncodeRequest request = encoding(items, row_scale, rotation, bits, blocks, fine);
  request.threads = chosen_threads(torch_threads);
  const py::gil_scoped_release released;
  urm::encode_blocks(request);
}

void encode_rows(const Matrix& items, const std::optional<Matrix>& row_scale, const RotationSpec& rotation, int bits,
                 uintptr_t blocks, uintptr_t fine, uintptr_t rows, int64_t blocks_count) {
  const urm::EncodeRequest request = encoding(items, row_scale, rotation, bits, blocks, fine);
  const py::gil_scoped_release released;
  urm::encode_rows(request, at<int64_t>(rows), blocks_count);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of urm_kernels; use the package, not this module.";
  find_main_thread();
  m.def("instruction_sets", &instruction_sets, "Usable instruction sets, best first.");
  m.def("instruction_set", [] { return chosen_kernels().name; }, "The one in use: URM_CPU_ISA, or the best.");
  m.def("threads", &chosen_threads, "Threads a call may use: URM_NUM_THREADS, or the number given (torch's).");
  m.def("score_topk", &score_topk,
        "Counts of the scan are added to five int64 at an address, where one is given; whether users' results are "
        "proven is written to as many bytes at another.");
  m.def("nearest", &nearest, "The k best rows under max, as the library's own clustering asks for them.");
  m.def("encode_blocks", &encode_blocks, "Codes of all whole blocks of the items.");
  m.def(
      "ask_for_large_pages", [](uintptr_t memory, int64_t bytes) { urm::ask_for_large_pages(at<void>(memory), bytes); },
      "A hint for memory that has not been written yet.");
  m.def("encode_rows", &encode_rows, "Codes of rows into their places.");
  m.def("log_partition", &log_partition);
  m.def("log_partition_backward", &log_partition_backward);
  m.def("explore_topk", &explore_topk);
  m.def("score_candidates", &score_candidates, "Scores [users, count], or dots [users, queries, count] not reduced.");
  m.def(
      "write_rows",
      [](uintptr_t target, int64_t stride_bytes, int64_t row_bytes, uintptr_t rows, int64_t count, uintptr_t source) {
        const py::gil_scoped_release released;
        urm::write_rows(at<char>(target), stride_bytes, row_bytes, at<int64_t>(rows), count, at<char>(source));
      },
      "Copies rows of bytes to their places in a table.");
  m.def(
      "read_rows",
      [](uintptr_t target, int64_t row_bytes, uintptr_t rows, int64_t count, uintptr_t source, int64_t stride_bytes) {
        const py::gil_scoped_release released;
        urm::read_rows(at<char>(target), row_bytes, at<int64_t>(rows), count, at<char>(source), stride_bytes);
      },
      "Copies rows of bytes from their places in a table.");
  m.def(
      "upper_bounds",
      [](const Queries& queries, const Matrix& items, uintptr_t out) {
        return urm::upper_bounds(view(queries), view(items), chosen_kernels(), at<float>(out));
      },
      "Bounds of a bounded scan, [users * queries, rows]; False where it would score everything exactly.");
  m.def(
      "code_bounds",
      [](const Queries& queries, const Table& table, bool of_queries, uintptr_t out) {
        const urm::MatrixView items = view(std::get<0>(table));
        return urm::code_bounds(view(queries), items, view(*std::get<5>(table)), chosen_kernels(), of_queries,
                                at<float>(out));
      },
      "Bounds from codes of the scan, [users, rows], or of every query, [users * queries, rows]; False where none "
      "are.");
  m.def(
      "cell_bounds",
      [](const Queries& queries, const Table& table, uintptr_t out) {
        const urm::MatrixView items = view(std::get<0>(table));
        return urm::cell_bounds(view(queries), items, view(*std::get<5>(table)), chosen_kernels(), at<float>(out));
      },
      "Bounds of all rows of each cell, [cells, users]; False where none are.");
  m.def(
      "code_rate",
      [](int64_t steps, int threads) {
        const urm::Kernels& kernels = chosen_kernels();
        const py::gil_scoped_release released;
        return urm::code_rate(steps, threads, kernels);
      },
      "Integer operations a second of the fastest products of codes; a multiply-add counts two.");
  m.def(
      "read_bandwidth",
      [](uintptr_t data, int64_t count, int threads) {
        const urm::Kernels& kernels = chosen_kernels();
        const py::gil_scoped_release released;
        return urm::read_bandwidth(at<float>(data), count, threads, kernels);
      },
      "Bytes a second of one read of `count` floats at an address.");
  m.def(
      "gather_bandwidth",
      [](const Matrix& items, uintptr_t rows, int64_t count, int threads) {
        const py::gil_scoped_release released;
        return urm::gather_bandwidth(view(items), at<int64_t>(rows), count, threads);
      },
      "Bytes a second of one read of rows that exist, whose elements follow each other.");
  m.def(
      "fma_rate",
      [](int64_t steps, int threads) {
        const urm::Kernels& kernels = chosen_kernels();
        const py::gil_scoped_release released;
        return urm::fma_rate(steps, threads, kernels);
      },
      "fp32 operations a second; a multiply-add counts two.");
}
