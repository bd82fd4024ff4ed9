// Shared by op boundaries on CUDA tensors: the current stream, and runtime errors as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Only a CUDA build of torch has it. Weak, so that the library loads beside a CPU build too.
#pragma weak aoti_torch_get_current_cuda_stream

namespace resformer {
namespace {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error), " (", cudaGetErrorName(error),
                  ")");
}

// Makes the tensor's device the current one while it lives.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(&aoti_torch_get_current_cuda_stream != nullptr, "this torch is built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace
}  // namespace resformer
