// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime without a GPU, in place of libcudart in the emulated build of the package: what
// nvcc emits for `kernel<<<...>>>(...)` and what csrc/ calls of the runtime. Launches, copies and
// fills go to the functions that tests/ptx/device.py gives to t2p_emulator_connect, with the
// current device and the stream: they say whether those are the tensors'. "Device" memory is the
// host's. Calls that wait for the GPU, or allocate, are refused; a function that is missing here is
// an error of the linker.
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

namespace {

struct Kernel {
  int module;
  std::string name;
};

struct Variable {
  int module;
  std::string name;
  size_t size;
};

struct Handlers {
  // All return a cudaError_t.
  int (*in_queue)(const char* what, int device, const void* stream);  // something is to run there
  int (*on_device)(const char* call, int device);                     // of which something is asked
  int (*refused)(const char* call);
  int (*launch)(int module, const char* name, const unsigned* grid, const unsigned* block,
                size_t shared, void** arguments);
  int (*attribute)(int number, int* value);
  int (*written)(void* to, size_t bytes);  // the host or a copy has written there
  int (*shared_limit)(int module, const char* name, int bytes);
  int (*occupancy)(int module, const char* name, int threads, size_t shared, int* blocks);
  int (*static_shared)(int module, const char* name, int* bytes);
  void* (*variable)(int module, const char* name);  // where a __device__ variable lies
  int (*part)(const void* base, size_t offset, size_t bytes, const char* name);
};

struct State {
  std::vector<const void*> modules;  // as nvcc registers them: pointers to fat binary wrappers
  std::map<const void*, Kernel> kernels;
  std::map<const void*, Variable> variables;
  Handlers handlers{};
  bool connected = false;
};

// Never freed: modules unregister themselves when the process ends, after static objects.
State& state() {
  static State* all = new State;
  return *all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;
thread_local cudaError_t last_error = cudaSuccess;
constexpr int kDevices = 2;
thread_local int current_device = 0;

cudaError_t result(int code) {
  const auto error = static_cast<cudaError_t>(code);
  if (error != cudaSuccess) last_error = error;
  return error;
}

const Kernel* find(const void* function) {
  const auto found = state().kernels.find(function);
  return found == state().kernels.end() ? nullptr : &found->second;
}

cudaError_t on_device(const char* call, int device) {
  if (!state().connected) return result(cudaErrorInsufficientDriver);
  return result(state().handlers.on_device(call, device));
}

cudaError_t in_queue(const char* what, cudaStream_t stream) {
  if (!state().connected) return result(cudaErrorInsufficientDriver);
  return result(state().handlers.in_queue(what, current_device, stream));
}

cudaError_t refuse(const char* call) {
  if (!state().connected) return result(cudaErrorInsufficientDriver);
  return result(state().handlers.refused(call));
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                   cudaStream_t stream) {
  const Kernel* kernel = find(function);
  if (!kernel) return result(cudaErrorInvalidDeviceFunction);
  const char* name = kernel->name.c_str();
  if (const cudaError_t status = in_queue(name, stream)) return status;
  const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
  return result(state().handlers.launch(kernel->module, name, blocks, threads, shared, arguments));
}

cudaError_t copy(const char* call, void* to, const void* from, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t status = in_queue(call, stream)) return status;
  const char* source = static_cast<const char*>(from);
  char* at = static_cast<char*>(to);
  for (size_t i = 0; i < bytes; ++i) at[i] = source[i];
  return result(state().handlers.written(to, bytes));
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

// For device.py ----------------------------------------------------------------------------------

void t2p_emulator_connect(const Handlers* handlers) {
  state().handlers = *handlers;
  state().connected = true;
}
// For csrc/common/carver.h
void t2p_emulator_part(const void* base, size_t offset, size_t bytes, const char* name) {
  if (state().connected) result(state().handlers.part(base, offset, bytes, name));
}
int t2p_emulator_modules() { return static_cast<int>(state().modules.size()); }
const void* t2p_emulator_module(int index) { return state().modules[index]; }

// What nvcc emits --------------------------------------------------------------------------------

void** __cudaRegisterFatBinary(void* wrapper) {
  state().modules.push_back(wrapper);
  return reinterpret_cast<void**>(state().modules.size());  // the number of the module, from 1
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void** module, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  state().kernels[host] = {static_cast<int>(reinterpret_cast<size_t>(module)) - 1, name};
}
void __cudaRegisterVar(void** module, char* host, char*, const char* name, int, size_t size, int,
                       int) {
  state().variables[host] = {static_cast<int>(reinterpret_cast<size_t>(module)) - 1, name, size};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, static_cast<cudaStream_t>(stream)};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return find(function) ? cudaSuccess : result(cudaErrorInvalidDeviceFunction);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}

// Errors -----------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInsufficientDriver:
      return "the emulator is not connected";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNotPermitted:
      return "not what an op may do";
    default:
      return "the emulated kernel failed";
  }
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

// Devices, two of them; what is put in a stream is done at once -----------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return result(cudaErrorInvalidDevice);
  if (const cudaError_t status = on_device("cudaDeviceGetAttribute", device)) return status;
  return result(state().handlers.attribute(attribute, value));
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Kernels ----------------------------------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const Kernel* kernel = find(function);
  if (!kernel) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t status = on_device("cudaFuncSetAttribute", current_device)) return status;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return result(cudaErrorInvalidValue);
  }
  return result(state().handlers.shared_limit(kernel->module, kernel->name.c_str(), value));
}
// Of its attributes, the static shared memory alone: PTX does not know the others.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const Kernel* kernel = find(function);
  if (!kernel) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t status = on_device("cudaFuncGetAttributes", current_device)) return status;
  int bytes = 0;
  const int status = state().handlers.static_shared(kernel->module, kernel->name.c_str(), &bytes);
  *attributes = {};
  attributes->sharedSizeBytes = static_cast<size_t>(bytes);
  return result(status);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks,
                                                                   const void* function,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  const Kernel* kernel = find(function);
  if (!kernel) return result(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t status =
          on_device("cudaOccupancyMaxActiveBlocksPerMultiprocessor", current_device)) {
    return status;
  }
  return result(
      state().handlers.occupancy(kernel->module, kernel->name.c_str(), threads, shared, blocks));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared,
                                                                0);
}

// Memory -----------------------------------------------------------------------------------------

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t status = in_queue("cudaMemsetAsync", stream)) return status;
  char* at = static_cast<char*>(to);
  for (size_t i = 0; i < bytes; ++i) at[i] = static_cast<char>(value);
  return result(state().handlers.written(to, bytes));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return copy("cudaMemcpyAsync", to, from, bytes, stream);
}
cudaError_t cudaGetSymbolAddress(void** at, const void* symbol) {
  if (const cudaError_t status = on_device("cudaGetSymbolAddress", current_device)) return status;
  const auto found = state().variables.find(symbol);
  if (found == state().variables.end()) return result(cudaErrorInvalidSymbol);
  *at = state().handlers.variable(found->second.module, found->second.name.c_str());
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes,
                                    size_t offset, cudaMemcpyKind, cudaStream_t stream) {
  void* at = nullptr;
  if (const cudaError_t status = cudaGetSymbolAddress(&at, symbol)) return status;
  return copy("cudaMemcpyToSymbolAsync", static_cast<char*>(at) + offset, from, bytes, stream);
}

// What an op never does: it would hold up the host, and could not be captured in a graph ----------

#define T2P_REFUSED(name, ...) \
  cudaError_t name(__VA_ARGS__) { return refuse(#name); }

T2P_REFUSED(cudaDeviceSynchronize)
T2P_REFUSED(cudaStreamSynchronize, cudaStream_t)
T2P_REFUSED(cudaStreamQuery, cudaStream_t)
T2P_REFUSED(cudaEventSynchronize, cudaEvent_t)
T2P_REFUSED(cudaEventQuery, cudaEvent_t)
T2P_REFUSED(cudaDeviceReset)
T2P_REFUSED(cudaMalloc, void**, size_t)
T2P_REFUSED(cudaMallocAsync, void**, size_t, cudaStream_t)
T2P_REFUSED(cudaMallocHost, void**, size_t)
T2P_REFUSED(cudaMallocManaged, void**, size_t, unsigned)
T2P_REFUSED(cudaHostAlloc, void**, size_t, unsigned)
T2P_REFUSED(cudaFree, void*)
T2P_REFUSED(cudaFreeAsync, void*, cudaStream_t)
T2P_REFUSED(cudaFreeHost, void*)
T2P_REFUSED(cudaMemset, void*, int, size_t)
T2P_REFUSED(cudaMemcpy, void*, const void*, size_t, cudaMemcpyKind)
T2P_REFUSED(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)
T2P_REFUSED(cudaMemcpyFromSymbol, void*, const void*, size_t, size_t, cudaMemcpyKind)

#undef T2P_REFUSED

#pragma GCC visibility pop
}
