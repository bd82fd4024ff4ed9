#include "run.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "fault.h"
#include "machine.h"
#include "memory.h"
#include "program.h"
#include "start.h"

namespace {

using gpu::text_of;

// JSON, as much of it as the reports have.
std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out + '"';
}

char* handed_out(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

std::string place(const gpu::Program& program, const gpu::Instruction& at) {
  const std::string file = at.line != 0 && at.file < program.files.size() ? program.files[at.file] : "";
  return text_of("\"instruction\": ", quoted(at.text), ", \"pc\": ", at.pc, ", \"ptx_line\": ", at.ptx_line,
                 ", \"file\": ", quoted(file), ", \"line\": ", at.line);
}

std::string fault_of(const gpu::Fault& fault, const gpu::Machine* machine, const gpu::Course* course) {
  std::string out = text_of("{\"fault\": {\"kind\": ", quoted(gpu::kind_name(fault.kind)),
                            ", \"message\": ", quoted(fault.message), ", \"lane\": ", fault.lane);
  if (machine != nullptr) {
    const gpu::Program& program = *machine->program;
    out += text_of(", \"kernel\": ", quoted(machine->kernel->name));
    if (course->culprit != nullptr)
      out += text_of(", \"block\": ", course->culprit->block->number, ", \"warp\": ", course->culprit->index,
                     ", ", place(program, machine->kernel->instructions[course->pc]));
    if (fault.other >= 0)
      out += text_of(", \"other\": {", place(program, machine->kernel->instructions[fault.other]),
                     ", \"block\": ", fault.other_block, ", \"warp\": ", fault.other_warp, "}");
    std::string standing;
    for (const std::string& line : course->standing)
      standing += (standing.empty() ? "" : ", ") + quoted(line);
    out += ", \"warps\": [" + standing + "]";
  }
  return out + "}}";
}

std::string counts_of(const gpu::Machine& machine, const gpu::Course& course) {
  std::map<std::string, uint64_t> by_opcode;
  for (const gpu::Instruction& at : machine.kernel->instructions) {
    if (machine.executed[at.pc] == 0) continue;
    std::string_view text = at.text;
    if (text.starts_with('@')) text.remove_prefix(std::min(text.find_first_of(" \t"), text.size()));
    text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    by_opcode[std::string(text.substr(0, text.find_first_of(" \t;")))] += machine.executed[at.pc];
  }
  std::string executed;
  for (const auto& [opcode, count] : by_opcode)
    executed += text_of(executed.empty() ? "" : ", ", quoted(opcode), ": ", count);
  return text_of("{\"steps\": ", machine.steps, ", \"blocks_resident\": ", course.resident,
                 ", \"executed\": {", executed, "}}");
}

gpu::Launch launch_of(const gpu_launch& given) {
  gpu::Launch launch;
  for (int i = 0; i < 3; ++i) {
    launch.grid[i] = given.grid[i];
    launch.threads[i] = given.threads[i];
  }
  launch.dynamic_shared = given.dynamic_shared;
  launch.registers = given.registers;
  launch.cooperative = given.cooperative != 0;
  const std::byte* params = static_cast<const std::byte*>(given.params);
  launch.params.assign(params, params + given.param_bytes);
  launch.limits = {given.multiprocessors, given.registers_sm, given.shared_sm, given.shared_block,
                   given.shared_reserved, given.warps_sm,     given.blocks_sm, given.threads_block};
  launch.policy = static_cast<gpu::Policy>(given.policy);
  launch.when = static_cast<gpu::When>(given.when);
  launch.seed = given.seed;
  launch.most_steps = given.most_steps;
  return launch;
}

std::vector<gpu::Region> regions_of(gpu::Program& program, const gpu_region* regions, uint32_t count) {
  std::vector<gpu::Region> found;
  for (uint32_t i = 0; i < count; ++i)
    found.push_back({regions[i].name, static_cast<std::byte*>(regions[i].data), regions[i].bytes,
                     regions[i].written, regions[i].writable != 0});
  for (gpu::Variable& variable : program.globals)
    found.push_back({variable.name, variable.initial.data(), variable.initial.size(), nullptr,
                     variable.space == gpu::Variable::Space::global});
  return found;
}

const gpu::Kernel& found_kernel(const gpu::Program& program, std::string_view name) {
  for (const gpu::Kernel& kernel : program.kernels)
    if (kernel.name == name) return kernel;
  gpu::fail(gpu::Kind::malformed, "no kernel is named ", name);
}

std::string described(const gpu::Program& program) {
  std::string kernels;
  for (const gpu::Kernel& kernel : program.kernels) {
    std::string params;
    for (const gpu::Variable& param : kernel.params)
      params += text_of(params.empty() ? "" : ", ", "{\"name\": ", quoted(param.name),
                        ", \"offset\": ", param.offset, ", \"bytes\": ", param.bytes,
                        ", \"align\": ", param.align, "}");
    kernels +=
        text_of(kernels.empty() ? "" : ", ", "{\"name\": ", quoted(kernel.name), ", \"params\": [", params,
                "], \"param_bytes\": ", kernel.param_bytes, ", \"shared_bytes\": ", kernel.shared_bytes,
                ", \"max_threads\": ", kernel.max_threads, ", \"max_registers\": ", kernel.max_registers,
                ", \"instructions\": ", kernel.instructions.size(), "}");
  }
  return text_of("{\"target\": ", quoted(program.target), ", \"kernels\": [", kernels, "]}");
}

}  // namespace

void* gpu_parse(const char* ptx, char** report) {
  *report = nullptr;
  try {
    return gpu::parse(ptx).release();
  } catch (const gpu::Fault& fault) {
    *report = handed_out(fault_of(fault, nullptr, nullptr));
    return nullptr;
  }
}

void gpu_describe(void* program, char** report) {
  *report = handed_out(described(*static_cast<gpu::Program*>(program)));
}

int gpu_run(void* handle, const char* name, const gpu_launch* given, const gpu_region* regions,
            uint32_t count, char** report) {
  gpu::Program& program = *static_cast<gpu::Program*>(handle);
  gpu::Machine machine;
  gpu::Course course;
  try {
    machine.program = &program;
    machine.kernel = &found_kernel(program, name);
    machine.launch = launch_of(*given);
    if (machine.launch.params.size() != machine.kernel->param_bytes) {
      gpu::fail(gpu::Kind::limits, machine.launch.params.size(), " bytes of arguments, for parameters of ",
                machine.kernel->param_bytes);
    }
    gpu::Memory memory(regions_of(program, regions, count));
    machine.memory = &memory;
    gpu::run(machine, course);
    *report = handed_out(counts_of(machine, course));
    return 0;
  } catch (const gpu::Fault& fault) {
    *report = handed_out(fault_of(fault, machine.kernel == nullptr ? nullptr : &machine, &course));
    return 1;
  }
}

int gpu_resident(void* program, const char* name, const gpu_launch* given, char** report) {
  try {
    const gpu::Kernel& kernel = found_kernel(*static_cast<gpu::Program*>(program), name);
    *report =
        handed_out(text_of("{\"blocks\": ", gpu::blocks_a_multiprocessor(kernel, launch_of(*given)), "}"));
    return 0;
  } catch (const gpu::Fault& fault) {
    *report = handed_out(fault_of(fault, nullptr, nullptr));
    return 1;
  }
}

void gpu_end(void* program) { delete static_cast<gpu::Program*>(program); }

void gpu_free(char* report) { std::free(report); }
