// The C face of the executor, for ctypes. Structures have no padding that a compiler would have to choose.
#pragma once

#include <cstdint>

extern "C" {

struct gpu_region {
  const char* name;
  void* data;
  uint64_t bytes;
  uint8_t* written;  // a byte for each of data's, 0 where nobody wrote yet; updated. nullptr: all written
  uint64_t writable;
};

struct gpu_launch {
  const void* params;
  uint64_t param_bytes;
  uint64_t seed, most_steps;
  uint32_t grid[3], threads[3];
  uint32_t dynamic_shared, registers, cooperative;
  uint32_t policy, when;  // in the order of machine.h
  uint32_t multiprocessors, registers_sm, shared_sm, shared_block, shared_reserved, warps_sm, blocks_sm,
      threads_block;
};

// A program, or nullptr; then *report is why. Reports are JSON; the caller frees them with gpu_free.
//   {"fault": {"kind", "message", "kernel", "block", "warp", "lane", "instruction", "pc", "ptx_line", "file",
//   "line",
//              "other": {"instruction", "ptx_line", "file", "line", "block", "warp"} or null,
//              "warps": ["block 0 warp 1: waits for ... at ..."] (deadlock, barrier)}}
void* gpu_parse(const char* ptx, char** report);
// {"target", "kernels": [{"name", "params": [{"name", "offset", "bytes", "align"}], "shared_bytes",
// "max_threads",
//   "instructions", "max_registers", "globals": [..]}]}
void gpu_describe(void* program, char** report);
// 0 and {"steps", "blocks_resident", "executed": {text of opcode: warp instructions}}; 1 and a fault.
int gpu_run(void* program, const char* kernel, const gpu_launch* launch, const gpu_region* regions,
            uint32_t count, char** report);
// 0 and {"blocks": those that a multiprocessor holds at a time}; 1 and a fault.
int gpu_resident(void* program, const char* kernel, const gpu_launch* launch, char** report);
void gpu_end(void* program);
void gpu_free(char* report);
}
