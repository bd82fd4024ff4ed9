// The Python module of host-side scheduling: page allocator and decode planner. It reads no tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/decode_plan.h"
#include "host/page_table.h"

namespace py = pybind11;
using resformer::DecodeGroup;
using resformer::DecodePlan;
using resformer::PageTable;
using resformer::SequenceId;

namespace {

// int32 rows in memory that torch.frombuffer takes without a copy.
py::bytearray block_table(const PageTable& table, const std::vector<SequenceId>& sequences, int64_t width) {
  if (width < 0) throw std::invalid_argument("width must be 0 or more, got " + std::to_string(width));
  const size_t bytes = sequences.size() * static_cast<size_t>(width) * sizeof(int32_t);
  auto rows = py::reinterpret_steal<py::bytearray>(PyByteArray_FromStringAndSize(nullptr, bytes));
  if (!rows) throw py::error_already_set();
  table.block_table(sequences, width, reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(rows.ptr())));
  return rows;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side scheduling of resformer_kernels: page allocator and decode planner.";

  py::class_<PageTable>(m, "PageTable")
      .def(py::init<int64_t, int64_t>(), py::arg("num_pages"), py::arg("page_size"))
      .def("create", &PageTable::create, py::arg("count") = 1)
      .def("append", &PageTable::append, py::arg("sequences"), py::arg("tokens"))
      .def("fork", &PageTable::fork, py::arg("sequence"))
      .def("crop", &PageTable::crop, py::arg("sequences"), py::arg("lengths"))
      .def("free", &PageTable::free, py::arg("sequences"))
      .def("reorder", &PageTable::reorder, py::arg("sequences"), py::arg("picks"))
      .def("length", &PageTable::length, py::arg("sequence"))
      .def("pages", &PageTable::pages, py::arg("sequence"))
      .def("block_table", &block_table, py::arg("sequences"), py::arg("width"))
      .def_property_readonly("num_pages", &PageTable::num_pages)
      .def_property_readonly("page_size", &PageTable::page_size)
      .def_property_readonly("free_pages", &PageTable::free_pages)
      .def(py::pickle([](const PageTable& table) { return table.state(); },
                      [](const PageTable::State& state) { return PageTable(state); }));

  py::class_<DecodeGroup>(m, "DecodeGroup")
      .def_readonly("sequences", &DecodeGroup::sequences)
      .def_readonly("num_splits", &DecodeGroup::num_splits)
      .def(py::pickle([](const DecodeGroup& group) { return std::tuple(group.sequences, group.num_splits); },
                      [](const std::tuple<std::vector<int64_t>, int64_t>& state) {
                        return std::make_from_tuple<DecodeGroup>(state);
                      }));
  py::class_<DecodePlan>(m, "DecodePlan")
      .def_readonly("groups", &DecodePlan::groups)
      .def_readonly("keys_per_split", &DecodePlan::keys_per_split)
      .def_readonly("efficiency", &DecodePlan::efficiency)
      .def(py::pickle(
          [](const DecodePlan& plan) {
            return std::tuple(plan.groups, plan.keys_per_split, plan.efficiency);
          },
          [](const std::tuple<std::vector<DecodeGroup>, int64_t, double>& state) {
            return std::make_from_tuple<DecodePlan>(state);
          }));
  m.def("plan_decode", &resformer::plan_decode, py::arg("lengths"), py::arg("heads"), py::arg("workers"),
        py::kw_only(), py::arg("tile") = 64, py::arg("overhead") = 64, py::arg("max_groups") = 1);
}
