// The architectures of this build and the version of the driver, read before any kernel is launched.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace resformer {
namespace {

#define RESFORMER_QUOTED(x) #x
#define RESFORMER_TEXT(x) RESFORMER_QUOTED(x)

std::string cuda_architectures() { return RESFORMER_TEXT(RESFORMER_CUDA_ARCHS); }

int64_t cuda_runtime_version() { return CUDART_VERSION; }

// Returns 0 without a driver.
int64_t cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&resformer::cuda_architectures));
  m.impl("cuda_runtime_version", TORCH_BOX(&resformer::cuda_runtime_version));
  m.impl("cuda_driver_version", TORCH_BOX(&resformer::cuda_driver_version));
}
