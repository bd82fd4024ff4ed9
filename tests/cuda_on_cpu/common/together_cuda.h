// Stands for csrc/common/together_cuda.h: the blocks of a grid take turns, thread after thread, some of them
// more often than others.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "common/launch_cuda.h"
#include "common/scalar.h"

#define __forceinline__ inline

using std::max;
using std::min;

inline Index blockDim;

namespace cuda_on_cpu {

inline std::vector<std::vector<unsigned char>> block_bytes;

}  // namespace cuda_on_cpu

namespace resformer {
namespace {

inline void post(uint64_t* word, uint32_t step, float value) {
  *word = static_cast<uint64_t>(step) << 32 | bits_from_float(value);
}

inline uint64_t peek(const uint64_t* word) { return *word; }

inline uint32_t step_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
inline float value_of(uint64_t word) { return float_from_bits(static_cast<uint32_t>(word)); }

inline void look_again() { cuda_on_cpu::wait(); }

inline unsigned char* block_memory() { return cuda_on_cpu::block_bytes[blockIdx.x].data(); }

inline void copy_async(float* to, const float* from) { *to = *from; }
inline void copies_done() {}

struct DeviceLimits {
  int64_t multiprocessors, block_bytes;
};

// Four multiprocessors, with as much memory as the environment says.
inline DeviceLimits device_limits() {
  const char* bytes = std::getenv("CUDA_ON_CPU_BLOCK_BYTES");
  STD_TORCH_CHECK(bytes != nullptr, "CUDA_ON_CPU_BLOCK_BYTES is not set");
  return {4, std::atoll(bytes)};
}

template <class Argument>
void launch_together(void (*kernel)(Argument), int64_t blocks, int64_t, int64_t bytes, cudaStream_t,
                     Argument argument, const char*) {
  constexpr uint32_t threads = 64;  // fewer than a GPU's, which take turns
  const DeviceLimits limits = device_limits();
  STD_TORCH_CHECK(blocks <= limits.multiprocessors && bytes <= limits.block_bytes, blocks, " blocks of ",
                  bytes, " bytes");
  // Full of NaN, which nothing may read before it is written; and more of it behind, which nothing may write.
  constexpr int64_t kBehind = 1024;
  cuda_on_cpu::block_bytes.assign(blocks, std::vector<unsigned char>(bytes + kBehind, 0xff));
  blockDim.x = threads;
  cuda_on_cpu::body = [&] { kernel(argument); };
  cuda_on_cpu::run_blocks(0, static_cast<uint32_t>(blocks), threads);
  for (const std::vector<unsigned char>& memory : cuda_on_cpu::block_bytes) {
    STD_TORCH_CHECK(std::count(memory.end() - kBehind, memory.end(), 0xff) == kBehind,
                    "a block wrote behind its memory");
  }
}

}  // namespace
}  // namespace resformer
