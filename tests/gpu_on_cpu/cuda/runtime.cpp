// Stands for the CUDA runtime, and for what torch does with a GPU, in the library of an op that has neither:
// linked with this, an op takes CPU tensors, and its kernels run wherever `cuda_use` says.
//
// A kernel may use the storages of which the op took an address, those of `const_data_ptr` and `data_ptr` to
// read alone. What the op allocated by `new_empty` counts as unwritten, and so does what lies between a
// tensor's elements.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../csrc/run.h"

extern "C" {

struct cuda_launch {
  const char* kernel;
  void* const* arguments;  // by parameter
  const gpu_region* regions;
  uint64_t region_count;
  uint32_t grid[3], threads[3];
  uint32_t dynamic_shared, cooperative;
};

// Each returns a cudaError_t, and says why by `cuda_say` first.
struct cuda_gpu {
  int (*launch)(const cuda_launch* given);
  int (*blocks_resident)(const char* kernel, uint32_t threads, uint64_t dynamic_shared, int* found);
  int (*attribute)(uint32_t which, int* found);
};
}

namespace {

constexpr int kUsualShared = 48 << 10;  // dynamic shared memory that a kernel may have without asking

struct Function {
  std::string name;
  int most_shared = kUsualShared;
};

struct Storage {
  AtenTensorHandle tensor;  // keeps it alive: no other storage takes its address meanwhile
  std::string name;
  std::vector<uint8_t> written;
  bool fresh, writable;
};

struct Configuration {
  dim3 grid, threads;
  size_t dynamic_shared;
  cudaStream_t stream;
};

struct State {
  cuda_gpu gpu{};
  std::map<const void*, Function> functions;  // by the address of their host side
  std::map<void*, Storage> storages;          // of the op that runs, by address
  std::vector<Configuration> configurations;
  std::string said;
  cudaError_t last_error = cudaSuccess;
  int guards = 0;
};

// Made when first asked for: kernels are registered before main.
State& state() {
  static State state;
  return state;
}

template <class Signature>
Signature* of_torch(const char* name) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  void* found = torch == nullptr ? nullptr : dlsym(torch, name);
  if (found == nullptr) throw std::runtime_error(std::string("libtorch_cpu.so has no ") + name);
  return reinterpret_cast<Signature*>(found);
}

cudaError_t noted(cudaError_t error, std::string_view why = {}) {
  if (error == cudaSuccess) return error;
  if (!why.empty()) state().said = why;
  return state().last_error = error;
}

void mark(uint8_t* at, int64_t element, int64_t rank, const int64_t* sizes, const int64_t* strides) {
  if (rank == 0) {
    std::memset(at, 1, element);
    return;
  }
  for (int64_t i = 0; i < sizes[0]; ++i) {
    mark(at + i * strides[0] * element, element, rank - 1, sizes + 1, strides + 1);
  }
}

// A tensor whose address is `data` is part of what kernels may use.
void note(AtenTensorHandle tensor, void* data, bool fresh, bool writable) {
  int32_t dtype = 0;
  int64_t offset = 0, bytes = 0, rank = 0, *sizes = nullptr, *strides = nullptr;
  if (data == nullptr || aoti_torch_get_dtype(tensor, &dtype) ||
      aoti_torch_get_storage_offset(tensor, &offset) || aoti_torch_get_storage_size(tensor, &bytes) ||
      aoti_torch_get_dim(tensor, &rank) || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || bytes == 0) {
    return;
  }
  const auto element = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  auto* base = static_cast<uint8_t*>(data) - offset * element;
  const auto [place, is_new] = state().storages.try_emplace(base);
  Storage& storage = place->second;
  if (is_new) {
    if (aoti_torch_new_tensor_handle(tensor, &storage.tensor)) storage.tensor = nullptr;
    storage.name = fresh ? "allocation " : "argument ";
    storage.name += std::to_string(state().storages.size() - 1) + " of shape (";
    for (int64_t i = 0; i < rank; ++i) storage.name += (i ? ", " : "") + std::to_string(sizes[i]);
    storage.name += ")";
    storage.written.resize(bytes);
    storage.fresh = fresh;
  }
  storage.writable |= writable;
  if (!storage.fresh) mark(storage.written.data() + offset * element, element, rank, sizes, strides);
}

AOTITorchError address(const char* name, AtenTensorHandle tensor, void** found, bool writable) {
  const AOTITorchError error = of_torch<decltype(aoti_torch_get_data_ptr)>(name)(tensor, found);
  if (error == AOTI_TORCH_SUCCESS) note(tensor, *found, false, writable);
  return error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 threads, void** arguments, size_t shared,
                   bool cooperative) {
  const auto found = state().functions.find(function);
  if (found == state().functions.end())
    return noted(cudaErrorInvalidDeviceFunction, "a function that is no kernel");
  if (shared > static_cast<size_t>(found->second.most_shared)) {
    return noted(cudaErrorInvalidValue,
                 "more dynamic shared memory than cudaFuncAttributeMaxDynamicSharedMemorySize says");
  }
  std::vector<gpu_region> regions;
  for (auto& [data, storage] : state().storages) {
    regions.push_back(
        {storage.name.c_str(), data, storage.written.size(), storage.written.data(), storage.writable});
  }
  const cuda_launch given{found->second.name.c_str(),
                          arguments,
                          regions.data(),
                          regions.size(),
                          {grid.x, grid.y, grid.z},
                          {threads.x, threads.y, threads.z},
                          static_cast<uint32_t>(shared),
                          cooperative};
  return noted(static_cast<cudaError_t>(state().gpu.launch(&given)));
}

}  // namespace

#define SEEN __attribute__((visibility("default")))

extern "C" {

// For the test.

SEEN void cuda_use(const cuda_gpu* given) { state().gpu = *given; }

SEEN void cuda_say(const char* why) { state().said = why; }

// What nvcc's host code calls.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  state().functions[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t dynamic_shared, cudaStream_t stream) {
  state().configurations.push_back({grid, threads, dynamic_shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* threads, size_t* dynamic_shared, void* stream) {
  const Configuration last = state().configurations.back();
  state().configurations.pop_back();
  *grid = last.grid;
  *threads = last.threads;
  *dynamic_shared = last.dynamic_shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 threads, void** arguments,
                               size_t dynamic_shared, cudaStream_t) {
  return launch(kernel, grid, threads, arguments, dynamic_shared, false);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 threads, void** arguments,
                             size_t dynamic_shared, cudaStream_t) {
  return launch(function, grid, threads, arguments, dynamic_shared, false);
}

// What our headers call.

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 threads, void** arguments,
                                        size_t dynamic_shared, cudaStream_t) {
  return launch(function, grid, threads, arguments, dynamic_shared, true);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = state().last_error;
  state().last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t) { return state().said.c_str(); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "another error";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return noted(static_cast<cudaError_t>(state().gpu.attribute(which, value)));
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return noted(cudaErrorInvalidValue, "an attribute that is not modelled");
  }
  int most = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (error != cudaSuccess) return error;
  if (value > most) return noted(cudaErrorInvalidValue, "more shared memory than a block can have");
  state().functions.at(function).most_shared = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t dynamic_shared) {
  const char* name = state().functions.at(function).name.c_str();
  return noted(static_cast<cudaError_t>(state().gpu.blocks_resident(name, threads, dynamic_shared, blocks)));
}

// What of torch's has to do with the GPU, or gives addresses.

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(&state().guards);
  ++state().guards;
  return AOTI_TORCH_SUCCESS;
}

// An op has launched all that it launches.
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  if (--state().guards > 0) return AOTI_TORCH_SUCCESS;
  for (auto& [data, storage] : state().storages) aoti_torch_delete_tensor_object(storage.tensor);
  state().storages.clear();
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** data) {
  return address("aoti_torch_get_data_ptr", tensor, data, false);
}

AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  return address("torch_get_const_data_ptr", tensor, const_cast<void**>(data), false);
}

AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  return address("torch_get_mutable_data_ptr", tensor, data, true);
}

AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  const auto call = of_torch<decltype(torch_call_dispatcher)>("torch_call_dispatcher");
  const AOTITorchError error = call(name, overload, stack, version);
  if (error == AOTI_TORCH_SUCCESS && std::string_view(name) == "aten::new_empty") {
    AtenTensorHandle tensor = nullptr;
    std::memcpy(&tensor, stack, sizeof tensor);
    void* data = nullptr;
    if (of_torch<decltype(aoti_torch_get_data_ptr)>("aoti_torch_get_data_ptr")(tensor, &data))
      return AOTI_TORCH_FAILURE;
    note(tensor, data, true, false);
  }
  return error;
}
}
