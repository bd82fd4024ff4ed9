// What a run ends with where a kernel does something that a GPU leaves undefined or refuses.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

namespace gpu {

// What is wrong, by kind. The names are those that Python sees: see `kind_name`.
enum class Kind {
  unknown,     // an opcode or a form of one that is not modelled
  bounds,      // an address outside of the launch's memory
  unwritten,   // bytes that nobody wrote were read
  misaligned,  // an address that is no multiple of what the instruction asks for
  race,        // two accesses that nothing orders, one of which writes
  proxy,       // the same, and only a fence between proxies is missing
  in_flight,   // registers or memory of an asynchronous operation, touched before it was waited for
  barrier,     // a barrier that not all of its threads reach, or used against its rules
  deadlock,    // no warp can go on
  limits,      // a launch beyond what the architecture has
  malformed,   // operands that the instruction does not take, such as a descriptor's
};

inline const char* kind_name(Kind kind) {
  static const char* const names[] = {"unknown",   "bounds",  "unwritten", "misaligned", "race",     "proxy",
                                      "in_flight", "barrier", "deadlock",  "limits",     "malformed"};
  return names[static_cast<int>(kind)];
}

// Thrown by whatever finds it. The machine adds the place: kernel, block, warp, instruction, source line.
struct Fault {
  Kind kind;
  std::string message;
  int lane = -1;         // the lane that did it, where one did
  int64_t other = -1;    // the pc of the other access of a race, or of the operation in flight
  int other_block = -1;  // block and warp of that
  int other_warp = -1;
};

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(Kind kind, const Parts&... parts) {
  throw Fault{kind, text_of(parts...)};
}

}  // namespace gpu
