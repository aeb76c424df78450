// SPDX-License-Identifier: Apache-2.0
// TensorView: a torch.Tensor argument, seen from C++ without a torch header or library.
//
// Two roads fill it. torch >= 2.10 has a C table, torch.Tensor.__dlpack_c_exchange_api__, that
// views a tensor without a call into Python. Older versions go through the attributes data_ptr,
// shape, stride, dtype and device. Both refuse what has no memory of its own (FakeTensor, meta).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/dlpack_abi.h"

namespace t2p {

class TensorView {
 public:
  TensorView() = default;

  // Throws TypeError if `object` is not a torch.Tensor with memory of its own.
  explicit TensorView(pybind11::handle object);

  // The views own no shape or strides beyond this many dimensions.
  static constexpr int kMaxDims = 8;

  int ndim() const { return ndim_; }
  std::int64_t size(int i) const { return shape_[i]; }
  std::int64_t stride(int i) const { return strides_[i]; }  // in elements
  std::int64_t count() const {
    std::int64_t product = 1;
    for (int i = 0; i < ndim_; ++i) product *= shape_[i];
    return product;
  }
  dlpack::Device device() const { return device_; }
  dlpack::DataType dtype() const { return dtype_; }
  std::int64_t element_size() const { return dtype_.bits / 8; }
  bool on_cuda() const { return device_.type == dlpack::kCuda; }
  bool contiguous() const;
  // A contiguous tensor of the same shape, dtype and device at `data`.
  TensorView elsewhere(void* data) const;
  bool is_float32() const { return dtype_.code == dlpack::kFloat && dtype_.bits == 32; }
  bool is_uint8() const { return dtype_.code == dlpack::kUInt && dtype_.bits == 8; }
  bool is_bfloat16() const { return dtype_.code == dlpack::kBfloat && dtype_.bits == 16; }
  bool is_float16() const { return dtype_.code == dlpack::kFloat && dtype_.bits == 16; }
  bool is_int64() const { return dtype_.code == dlpack::kInt && dtype_.bits == 64; }

  std::string shape_text() const;   // "[2, 3]"
  std::string dtype_text() const;   // "float32"
  std::string device_text() const;  // "cuda:0"

  template <class T>
  T* data() const {
    return static_cast<T*>(data_);
  }

 private:
  void load_from_table(pybind11::handle object);
  void load_from_attributes(pybind11::handle object);

  void* data_ = nullptr;
  dlpack::Device device_{dlpack::kCpu, 0};
  dlpack::DataType dtype_{dlpack::kFloat, 32, 1};
  int ndim_ = 0;
  std::int64_t shape_[kMaxDims] = {};
  std::int64_t strides_[kMaxDims] = {};
};

// Learns the torch that is in use; called once, from t2p_fast/__init__.py, with the module torch.
void init_tensor_road(pybind11::module_ torch);

// "dlpack" or "attributes".
const char* tensor_road();

// Whether tensor_of can be called: on the road of dlpack.
bool makes_tensors();

// The torch.Tensor that owns what is managed from now on.
pybind11::object tensor_of(dlpack::ManagedTensorVersioned* managed);

// torch's current stream on the tensor's device, a cudaStream_t.
void* current_stream(const TensorView& tensor);

// What every op asks of its arguments, in one voice. `op` and `name` go into the message.
void check_float32(const char* op, const char* name, const TensorView& tensor);
void check_int64(const char* op, const char* name, const TensorView& tensor);
void check_contiguous(const char* op, const char* name, const TensorView& tensor);
void check_same_device(const char* op, const char* name, const TensorView& tensor,
                       const char* other_name, const TensorView& other);

}  // namespace t2p

namespace pybind11::detail {

template <>
struct type_caster<t2p::TensorView> {
  PYBIND11_TYPE_CASTER(t2p::TensorView, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = t2p::TensorView(source);
    return true;
  }
};

}  // namespace pybind11::detail
