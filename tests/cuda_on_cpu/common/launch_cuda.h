// Stands for csrc/common/launch_cuda.h, and for CUDA, where there is neither: kernels run on the CPU, block
// after block, each thread of a block on a stack of its own. What threads do together (shuffles, barriers)
// they do in lockstep, as the threads of a warp that all take part would.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  uint32_t x = 0;
};

inline Index threadIdx, blockIdx;

using cudaStream_t = void*;
using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }

namespace cuda_on_cpu {

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  bool done = false;
  double slot = 0.0;  // what it gives to others in a shuffle
};

inline std::vector<Thread> threads(256);
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void enter() {
  body();
  threads[threadIdx.x].done = true;
  swapcontext(&threads[threadIdx.x].context, &scheduler);
}

// Every other thread of the block comes as far before this one goes on.
inline void wait() {
  const uint32_t self = threadIdx.x;
  swapcontext(&threads[self].context, &scheduler);
}

inline void run_block(uint32_t count) {
  STD_TORCH_CHECK(count <= threads.size(), "a block has ", count, " threads");
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    thread.done = false;
    makecontext(&thread.context, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (uint32_t i = 0; i < count; ++i) {
      if (threads[i].done) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
      left = left || !threads[i].done;
    }
  }
}

// kernel<<<blocks, count, 0, stream>>>(arguments) is written launch(kernel, blocks, count)(arguments).
template <class Kernel>
auto launch(Kernel kernel, uint32_t blocks, uint32_t count) {
  return [=](const auto&... arguments) {
    body = [&] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(count);
  };
}

}  // namespace cuda_on_cpu

inline double __shfl_xor_sync(uint32_t mask, double value, int lane) {
  STD_TORCH_CHECK(mask == 0xffffffffu, "all lanes take part");
  cuda_on_cpu::threads[threadIdx.x].slot = value;
  cuda_on_cpu::wait();
  const double other = cuda_on_cpu::threads[threadIdx.x ^ lane].slot;
  cuda_on_cpu::wait();
  return other;
}

inline void __syncthreads() { cuda_on_cpu::wait(); }

namespace resformer {
namespace {

inline void check_cuda(cudaError_t, const char*) {}

class Launch {
 public:
  explicit Launch(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace
}  // namespace resformer
