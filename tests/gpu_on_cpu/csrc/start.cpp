#include "start.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace gpu {
namespace {

uint32_t rounded_up(uint32_t x, uint32_t to) { return (x + to - 1) / to * to; }

void set_special(Warp& warp, const SpecialRow& special) {
  const Block& block = *warp.block;
  const Launch& launch = block.machine->launch;
  const uint32_t x = launch.threads[0], y = launch.threads[1], shared = launch.dynamic_shared;
  const uint32_t warps = static_cast<uint32_t>(block.warps.size());
  for (uint32_t lane = 0; lane < LANES; ++lane) {
    const uint32_t thread = warp.index * LANES + lane;
    const Mask own = Mask(1) << lane;
    const uint32_t values[] = {
        thread % x, thread / x % y, thread / x / y, x, y, launch.threads[2], block.x, block.y, block.z,
        launch.grid[0], launch.grid[1], launch.grid[2], lane, warp.index, warps,
        block.slot % launch.limits.multiprocessors, launch.limits.multiprocessors,
        // Clusters have one block each.
        block.x, launch.grid[0], 0, 0, 1, own, own - 1, own | (own - 1), ~(own | (own - 1)), ~(own - 1),
        shared, block.machine->kernel->shared_bytes + shared};
    static_assert(std::size(values) == static_cast<size_t>(Special::total_smem_size) + 1);
    warp.row<uint32_t>(special.row)[lane] = values[static_cast<size_t>(special.which)];
  }
}

void fill_constant(std::byte* frame, const Constant& constant) {
  if (constant.width == 0) {
    const Mask mask = constant.bits ? ALL : 0;
    std::memcpy(frame + constant.row, &mask, sizeof mask);
    return;
  }
  for (int lane = 0; lane < LANES; ++lane) {
    std::byte* to = frame + constant.row + lane * constant.width;
    std::memset(to, 0, constant.width);
    std::memcpy(to, &constant.bits, std::min(constant.width, 8u));
  }
}

}  // namespace

void start_warp(Warp& warp, uint32_t threads) {
  const Kernel& kernel = *warp.block->machine->kernel;
  const uint32_t left = threads - warp.index * LANES;
  warp.exists = warp.live = left >= LANES ? ALL : (Mask(1) << left) - 1;
  warp.groups.push_back({0, warp.live});
  warp.frame = warp.block->frames.data() + size_t(warp.index) * kernel.frame_bytes;
  for (const Constant& constant : kernel.constants) fill_constant(warp.frame, constant);
  for (const SpecialRow& special : kernel.specials) set_special(warp, special);
  warp.local.resize(size_t(kernel.local_bytes) * LANES);
}

uint64_t count_of(const uint32_t (&extents)[3]) { return uint64_t(extents[0]) * extents[1] * extents[2]; }

uint32_t blocks_a_multiprocessor(const Kernel& kernel, const Launch& launch) {
  const Limits& limits = launch.limits;
  const uint64_t threads = count_of(launch.threads);
  const uint32_t shared = kernel.shared_bytes + launch.dynamic_shared;
  if (threads == 0 || threads > limits.threads_a_block)
    fail(Kind::limits, threads, " threads a block, of at most ", limits.threads_a_block);
  if (shared > limits.shared_block_bytes)
    fail(Kind::limits, shared, " bytes of shared memory a block, of at most ", limits.shared_block_bytes);
  if (kernel.max_threads != 0 &&
      (threads > kernel.max_threads || (kernel.threads_required && threads != kernel.max_threads)))
    fail(Kind::limits, threads, " threads a block of a kernel that is compiled for ", kernel.max_threads);
  const uint32_t warps = rounded_up(static_cast<uint32_t>(threads), LANES) / LANES;
  // Each quarter of a multiprocessor has its own registers, of which a warp takes units of 256.
  const uint32_t of_warp = rounded_up(std::max(launch.registers, 1u) * LANES, 256);
  const uint32_t by_registers = limits.registers / 4 / of_warp * 4 / warps;
  if (by_registers == 0)
    fail(Kind::limits, launch.registers, " registers of each of ", threads, " threads, of ",
         limits.registers);
  return std::min({limits.blocks, limits.warps / warps, by_registers,
                   limits.shared_bytes / rounded_up(shared + limits.shared_reserved, 128)});
}

}  // namespace gpu
