// Threads that add to the same sums, in an order that none of them chooses.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace resformer::RESFORMER_ISA {

// One counter per tile of sums. The order makes the bits independent of the threads. A thread only waits for
// units that were taken before its own, and whoever takes a unit runs it to its end: nobody waits in a
// circle, however few threads there are.
class Turns {
 public:
  explicit Turns(int64_t tiles) : passed_(tiles) {}

  // Returns once `turn` units have passed the tile.
  void wait(int64_t tile, int64_t turn) const {
    constexpr int kSpins = 1024;
    for (int spins = 0; passed_[tile].load(std::memory_order_acquire) != turn;) {
      if (spins < kSpins) {
        ++spins;
      } else {
        std::this_thread::yield();
      }
    }
  }
  void pass(int64_t tile) const { passed_[tile].fetch_add(1, std::memory_order_release); }

 private:
  mutable std::vector<std::atomic<int64_t>> passed_;
};

}  // namespace resformer::RESFORMER_ISA
