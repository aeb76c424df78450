// SPDX-License-Identifier: Apache-2.0
// The part of the DLPack 1.x ABI that the bindings read and write. The layouts are fixed by the
// DLPack specification; the function table is what torch.Tensor.__dlpack_c_exchange_api__ points
// to, a capsule named "dlpack_exchange_api".
#pragma once

#include <cstdint>

namespace t2p::dlpack {

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;    // [ndim]
  std::int64_t* strides;  // [ndim], in elements
  std::uint64_t byte_offset;
};

// What a capsule named "dltensor" holds: a tensor and who frees it, once, from any thread.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};

struct Version {
  std::uint32_t major, minor;
};

// The same since version 1.0.
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned* self);
  std::uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;      // an older table, or null
  void* allocate;             // not used here
  void* managed_from_object;  // not used here
  // These return 0, or -1 with a Python error set.
  int (*managed_to_object)(ManagedTensorVersioned* tensor, void** py_object);
  int (*view_of_object)(void* py_object, Tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

}  // namespace t2p::dlpack
