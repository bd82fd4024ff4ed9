// Stands for csrc/common/launch_cuda.h, and for CUDA, where there is neither: kernels run on the CPU, block
// after block (but for those of together_cuda.h), each thread of a block on a stack of its own. What threads
// do together (shuffles, barriers) they do in lockstep, as the threads of a warp that all take part would.
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

inline std::vector<Thread> threads;
inline uint32_t block_at = 0;  // where the block's threads are among these

struct Barrier {
  uint32_t arrived = 0, generation = 0;
  uint32_t pause = 0;  // turns that the block misses
};

inline std::vector<Barrier> barriers;  // one a block
inline uint32_t block_threads = 0;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void enter() {
  body();
  Thread& self = threads[block_at + threadIdx.x];
  self.done = true;
  swapcontext(&self.context, &scheduler);
}

// Every other thread comes as far before this one goes on.
inline void wait() { swapcontext(&threads[block_at + threadIdx.x].context, &scheduler); }

// Blocks [first, first + blocks) at once, `count` threads each.
inline void run_blocks(uint32_t first, uint32_t blocks, uint32_t count) {
  STD_TORCH_CHECK(count <= 256, "a block has ", count, " threads");
  if (threads.size() < blocks * count) threads.resize(blocks * count);
  barriers.assign(blocks, Barrier{});
  block_threads = count;
  for (uint32_t i = 0; i < blocks * count; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    thread.done = false;
    makecontext(&thread.context, enter, 0);
  }
  uint32_t luck = 1, idle = 0;
  for (bool left = true; left;) {
    left = false;
    STD_TORCH_CHECK(blocks == 1 || ++idle < 100000, "blocks wait for one another");
    for (Barrier& barrier : barriers) {
      if (barrier.arrived == count) {
        barrier.arrived = idle = 0;
        ++barrier.generation;
      }
      // Some blocks are well behind others.
      luck = luck * 1664525u + 1013904223u;
      if (barrier.pause > 0) {
        --barrier.pause;
      } else if (blocks > 1 && luck >> 26 == 0) {
        barrier.pause = luck >> 20;
      }
    }
    for (uint32_t i = 0; i < blocks * count; ++i) {
      if (threads[i].done) continue;
      if (barriers[i / count].pause > 0) {
        left = true;
        continue;
      }
      blockIdx.x = first + i / count;
      block_at = i / count * count;
      threadIdx.x = i % count;
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
    for (uint32_t block = 0; block < blocks; ++block) run_blocks(block, 1, count);
  };
}

}  // namespace cuda_on_cpu

inline double __shfl_xor_sync(uint32_t mask, double value, int lane) {
  STD_TORCH_CHECK(mask == 0xffffffffu, "all lanes take part");
  cuda_on_cpu::Thread* block = cuda_on_cpu::threads.data() + cuda_on_cpu::block_at;
  block[threadIdx.x].slot = value;
  cuda_on_cpu::wait();
  const double other = block[threadIdx.x ^ lane].slot;
  cuda_on_cpu::wait();
  return other;
}

// All go on in one turn, the one after that in which the last arrived: a warp is in step again.
inline void __syncthreads() {
  using namespace cuda_on_cpu;
  Barrier& barrier = barriers[block_at / block_threads];
  const uint32_t generation = barrier.generation;
  ++barrier.arrived;
  do wait();
  while (barrier.generation == generation);
}

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
