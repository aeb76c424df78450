// SPDX-License-Identifier: Apache-2.0
#include "bindings/tensor_view.h"

#include <cstdlib>
#include <string_view>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace t2p {
namespace {

struct Torch {
  const dlpack::ExchangeApi* table = nullptr;  // null: the road of attributes
  py::object tensor_type, cuda;
  // For the road of attributes. A name made once saves making and hashing it for every tensor.
  py::str shape{"shape"}, stride{"stride"}, dtype{"dtype"}, data_ptr{"data_ptr"}, is_cpu{"is_cpu"};
  std::vector<std::pair<py::object, dlpack::DataType>> dtypes;  // torch has one object for each
};

// Leaked: it must outlive every tensor, and Python objects cannot be freed after the interpreter.
Torch& torch_in_use() {
  static Torch* torch = new Torch;
  return *torch;
}

const char* type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

dlpack::DataType parse_dtype(std::string_view text) {
  // "torch.float32", "torch.bfloat16", "torch.int64", "torch.uint8", "torch.bool"
  if (const auto dot = text.find('.'); dot != text.npos) text.remove_prefix(dot + 1);
  if (text == "bool") return {dlpack::kBool, 8, 1};
  const auto digits = text.find_first_of("0123456789");
  const int bits = digits == text.npos ? 0 : std::atoi(std::string(text.substr(digits)).c_str());
  const std::string_view kind = text.substr(0, digits);
  const std::uint8_t code = kind == "float"    ? dlpack::kFloat
                            : kind == "bfloat" ? dlpack::kBfloat
                            : kind == "int"    ? dlpack::kInt
                            : kind == "uint"   ? dlpack::kUInt
                                               : 255;
  return {code, static_cast<std::uint8_t>(bits), 1};
}

py::object owned(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

py::object get(py::handle object, const py::str& name) {
  return owned(PyObject_GetAttr(object.ptr(), name.ptr()));
}

py::object call(py::handle object, const py::str& name) {
  return owned(PyObject_CallMethodObjArgs(object.ptr(), name.ptr(), nullptr));
}

dlpack::DataType dtype_of(const py::object& dtype) {
  for (const auto& [known, meaning] : torch_in_use().dtypes) {
    if (dtype.is(known)) return meaning;
  }
  return parse_dtype(py::cast<std::string>(py::str(dtype)));
}

dlpack::Device device_of(py::handle tensor) {
  const py::object device = tensor.attr("device");
  const auto kind = py::cast<std::string>(device.attr("type"));
  T2P_CHECK(kind == "cpu" || kind == "cuda", "a tensor on ", kind, " is not supported");
  if (kind == "cpu") return {dlpack::kCpu, 0};
  return {dlpack::kCuda, py::cast<std::int32_t>(device.attr("index"))};
}

}  // namespace

void init_tensor_road(py::module_ torch) {
  Torch& in_use = torch_in_use();
  in_use.tensor_type = torch.attr("Tensor");
  in_use.cuda = torch.attr("cuda");
  in_use.dtypes.clear();
  for (const char* name : {"float32", "int64", "bfloat16", "float16", "uint8", "bool", "int32"}) {
    in_use.dtypes.emplace_back(torch.attr(name), parse_dtype(name));
  }
  const char* forced = std::getenv("T2P_TENSOR_ROAD");
  const std::string_view road = forced ? forced : "";
  T2P_CHECK(road.empty() || road == "dlpack" || road == "attributes", "T2P_TENSOR_ROAD=", road,
            " is not one of dlpack, attributes");
  if (road == "attributes") return;
  if (!py::hasattr(in_use.tensor_type, "__dlpack_c_exchange_api__")) {
    T2P_CHECK(road.empty(), "T2P_TENSOR_ROAD=dlpack needs torch >= 2.10");
    return;
  }
  const py::object capsule = in_use.tensor_type.attr("__dlpack_c_exchange_api__");
  void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  const auto* api = static_cast<const dlpack::ExchangeApi*>(table);
  if (api->version.major == 1) in_use.table = api;
}

const char* tensor_road() { return torch_in_use().table ? "dlpack" : "attributes"; }

bool makes_tensors() { return torch_in_use().table != nullptr; }

py::object tensor_of(dlpack::ManagedTensorVersioned* managed) {
  void* object = nullptr;
  if (torch_in_use().table->managed_to_object(managed, &object) != 0) {
    throw py::error_already_set();  // who owns `managed` is not said: better lost than freed twice
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

TensorView::TensorView(py::handle object) {
  const Torch& torch = torch_in_use();
  T2P_CHECK_TYPE(
      torch.tensor_type && PyObject_IsInstance(object.ptr(), torch.tensor_type.ptr()) == 1,
      "expected a torch.Tensor, got ", type_name(object));
  torch.table ? load_from_table(object) : load_from_attributes(object);
}

void TensorView::load_from_table(py::handle object) {
  dlpack::Tensor view;
  if (torch_in_use().table->view_of_object(object.ptr(), &view) != 0) {
    PyErr_Clear();
    T2P_CHECK_TYPE(false, "cannot read the memory of a ", type_name(object));
  }
  T2P_CHECK(view.ndim <= kMaxDims, "a tensor of ", view.ndim, " dimensions is not supported");
  data_ = static_cast<char*>(view.data) + view.byte_offset;
  device_ = view.device;
  dtype_ = view.dtype;
  ndim_ = view.ndim;
  for (int i = 0; i < ndim_; ++i) {
    shape_[i] = view.shape[i];
    strides_[i] = view.strides[i];
  }
  T2P_CHECK_TYPE(view.data != nullptr || count() == 0, "cannot read the memory of a ",
                 type_name(object), ": it has none of its own");
}

void TensorView::load_from_attributes(py::handle object) {
  const Torch& torch = torch_in_use();
  const auto shape = py::cast<py::tuple>(get(object, torch.shape));
  const auto strides = py::cast<py::tuple>(call(object, torch.stride));
  T2P_CHECK(shape.size() <= kMaxDims, "a tensor of ", shape.size(), " dimensions is not supported");
  ndim_ = static_cast<int>(shape.size());
  for (int i = 0; i < ndim_; ++i) {
    shape_[i] = py::cast<std::int64_t>(shape[i]);
    strides_[i] = py::cast<std::int64_t>(strides[i]);
  }
  device_ = get(object, torch.is_cpu).is(py::bool_(true)) ? dlpack::Device{dlpack::kCpu, 0}
                                                          : device_of(object);
  dtype_ = dtype_of(get(object, torch.dtype));
  try {
    data_ = reinterpret_cast<void*>(py::cast<std::uintptr_t>(call(object, torch.data_ptr)));
  } catch (py::error_already_set&) {
    data_ = nullptr;  // a FakeTensor raises
  }
  T2P_CHECK_TYPE(data_ != nullptr || count() == 0, "cannot read the memory of a ",
                 type_name(object), ": it has none of its own");
}

bool TensorView::contiguous() const {
  std::int64_t expected = 1;
  for (int i = ndim_ - 1; i >= 0; --i) {
    if (shape_[i] != 1 && strides_[i] != expected) return count() == 0;
    expected *= shape_[i];
  }
  return true;
}

TensorView TensorView::elsewhere(void* data) const {
  TensorView other = *this;
  other.data_ = data;
  std::int64_t stride = 1;
  for (int i = ndim_ - 1; i >= 0; --i) {
    other.strides_[i] = stride;
    stride *= shape_[i];
  }
  return other;
}

std::string TensorView::shape_text() const {
  std::string text = "[";
  for (int i = 0; i < ndim_; ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
  return text + "]";
}

std::string TensorView::dtype_text() const {
  const char* kind = dtype_.code == dlpack::kFloat    ? "float"
                     : dtype_.code == dlpack::kBfloat ? "bfloat"
                     : dtype_.code == dlpack::kInt    ? "int"
                     : dtype_.code == dlpack::kUInt   ? "uint"
                     : dtype_.code == dlpack::kBool   ? "bool"
                                                      : "dtype of bits ";
  return dtype_.code == dlpack::kBool ? kind : kind + std::to_string(dtype_.bits);
}

std::string TensorView::device_text() const {
  return on_cuda() ? "cuda:" + std::to_string(device_.id) : "cpu";
}

void* current_stream(const TensorView& tensor) {
  const Torch& torch = torch_in_use();
  if (torch.table) {
    void* stream = nullptr;
    const dlpack::Device device = tensor.device();
    if (torch.table->current_stream(device.type, device.id, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const py::object stream = torch.cuda.attr("current_stream")(tensor.device().id);
  return reinterpret_cast<void*>(py::cast<std::uintptr_t>(stream.attr("cuda_stream")));
}

void check_float32(const char* op, const char* name, const TensorView& tensor) {
  T2P_CHECK_TYPE(tensor.is_float32(), op, ": ", name, " must be float32, got ",
                 tensor.dtype_text());
}

void check_int64(const char* op, const char* name, const TensorView& tensor) {
  T2P_CHECK_TYPE(tensor.is_int64(), op, ": ", name, " must be int64, got ", tensor.dtype_text());
}

void check_contiguous(const char* op, const char* name, const TensorView& tensor) {
  T2P_CHECK(tensor.contiguous(), op, ": ", name, " of shape ", tensor.shape_text(),
            " must be contiguous");
}

void check_same_device(const char* op, const char* name, const TensorView& tensor,
                       const char* other_name, const TensorView& other) {
  T2P_CHECK(tensor.device().type == other.device().type && tensor.device().id == other.device().id,
            op, ": ", name, " is on ", tensor.device_text(), " but ", other_name, " is on ",
            other.device_text());
}

}  // namespace t2p
