// Cooperative launches: blocks that are all resident at once and exchange numbers.
#pragma once

#include "common/launch_cuda.h"

namespace resformer {
namespace {

// A number and its step are one word, written and read as a whole: a reader that finds the step has the
// number, so neither a fence nor a grid-wide barrier is needed. Relaxed and at device scope: words live in
// the L2 cache, and no L1 cache holds a stale copy.
__device__ __forceinline__ void post(uint64_t* word, uint32_t step, float value) {
  const uint64_t posted = static_cast<uint64_t>(step) << 32 | bits_from_float(value);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(posted) : "memory");
}

__device__ __forceinline__ uint64_t peek(const uint64_t* word) {
  uint64_t found;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
  return found;
}

__device__ __forceinline__ uint32_t step_of(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
__device__ __forceinline__ float value_of(uint64_t word) {
  return float_from_bits(static_cast<uint32_t>(word));
}

// Called between polls of a word that has not arrived. A GPU runs the other threads meanwhile.
__device__ __forceinline__ void look_again() {}

// Dynamic shared memory of the block.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Asynchronous copy of a float from global to shared memory. This thread may read it after `copies_done`, the
// block's others after the next barrier.
__device__ __forceinline__ void copy_async(float* to, const float* from) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Properties of the current device.
struct DeviceLimits {
  int64_t multiprocessors, block_bytes;
};

inline DeviceLimits device_limits() {
  int device = 0, multiprocessors = 0, bytes = 0, together = 0;
  check_cuda(cudaGetDevice(&device), "device");
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "multiprocessors");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  check_cuda(cudaDeviceGetAttribute(&together, cudaDevAttrCooperativeLaunch, device), "cooperative launch");
  STD_TORCH_CHECK(together != 0, "this device has no cooperative launch");
  return {multiprocessors, bytes};
}

// A cooperative launch: all blocks are resident at once, or nothing runs and an error is raised.
template <class Argument>
void launch_together(void (*kernel)(Argument), int64_t blocks, int64_t threads, int64_t bytes,
                     cudaStream_t stream, Argument argument, const char* what) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  const auto memory = static_cast<int>(bytes);
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, memory), what);
  int each = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, static_cast<int>(threads),
                                                           static_cast<size_t>(bytes)),
             what);
  const int64_t most = each * device_limits().multiprocessors;
  STD_TORCH_CHECK(blocks <= most, what, ": ", blocks, " blocks have to be there at once, and ", most, " can");
  void* arguments[] = {&argument};
  check_cuda(cudaLaunchCooperativeKernel(function, dim3(static_cast<uint32_t>(blocks)),
                                         dim3(static_cast<uint32_t>(threads)), arguments,
                                         static_cast<size_t>(bytes), stream),
             what);
}

}  // namespace
}  // namespace resformer
