// AMX-BF16 for processors without it: the tile instructions raise SIGILL there, and this handler does what
// Intel's manual says they do, bit by bit. What runs is the code that ships.
//
// Any other illegal instruction, and any use that a processor would refuse, ends the process.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kRowBytes = 64;

struct Tile {
  int rows, row_bytes;
  alignas(64) uint8_t data[kMostRows][kRowBytes];
};

// The state of a thread, all zero as the manual has it before a configuration.
struct State {
  bool configured;
  Tile tiles[kTiles];
};

thread_local State state;
std::atomic<int64_t> emulated{0};

[[noreturn]] void refuse(const char* why, const uint8_t* code) {
  char text[200];
  const int size = snprintf(text, sizeof(text), "emulated AMX: %s, at %02x %02x %02x %02x %02x %02x\n", why,
                            code[0], code[1], code[2], code[3], code[4], code[5]);
  if (write(2, text, static_cast<size_t>(size)) < 0) _exit(98);
  _exit(97);
}

// One VEX.128.0F38.W0 instruction.
struct Instruction {
  int prefix, opcode;  // 0: none, 1: 66, 2: F3, 3: F2
  int reg, rm, vvvv;   // registers, with rm -1 where it is memory
  uint64_t base;       // the address without the index
  uint64_t index;      // times its scale
  int length;
};

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

uint64_t value_of(const ucontext_t* context, int number) {
  return static_cast<uint64_t>(context->uc_mcontext.gregs[kRegisters[number]]);
}

bool decode(const ucontext_t* context, const uint8_t* code, Instruction* out) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const int x = code[1] & 0x40 ? 0 : 8, b = code[1] & 0x20 ? 0 : 8;
  out->prefix = code[2] & 3;
  out->vvvv = ~(code[2] >> 3) & 15;
  out->opcode = code[3];
  if (out->opcode != 0x49 && out->opcode != 0x4b && out->opcode != 0x5c) return false;
  const int mod = code[4] >> 6, rm = code[4] & 7;
  out->reg = (code[4] >> 3 & 7) + (code[1] & 0x80 ? 0 : 8);
  out->rm = -1;
  out->base = out->index = 0;
  const uint8_t* next = code + 5;
  if (mod == 3) {
    out->rm = rm + b;
    out->length = 5;
    return true;
  }
  int number = rm + b;
  bool has_base = true;
  if (rm == 4) {
    const uint8_t sib = *next++;
    number = (sib & 7) + b;
    has_base = !(mod == 0 && (sib & 7) == 5);
    const int index = (sib >> 3 & 7) + x;
    if (index != 4) out->index = value_of(context, index) << (sib >> 6);
  } else if (mod == 0 && rm == 5) {
    has_base = false;
  }
  int32_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<int8_t>(*next++);
  } else if (mod == 2 || !has_base) {
    memcpy(&displacement, next, 4);
    next += 4;
  }
  if (has_base) {
    out->base = value_of(context, number);
  } else if (rm == 5) {  // relative to the next instruction
    out->base = reinterpret_cast<uint64_t>(next);
  }
  out->base += static_cast<uint64_t>(static_cast<int64_t>(displacement));
  out->length = static_cast<int>(next - code);
  return true;
}

void configure(const uint8_t* from, const uint8_t* code) {
  if (from[0] != 1 || from[1] != 0) refuse("a palette or a start row that is not known", code);
  for (int i = 2; i < 16; ++i)
    if (from[i] != 0) refuse("reserved bits in a configuration", code);
  for (int i = 32; i < 48; ++i)
    if (from[i] != 0) refuse("tiles past the eighth", code);
  memset(&state, 0, sizeof(state));
  for (int t = 0; t < kTiles; ++t) {
    uint16_t row_bytes;
    memcpy(&row_bytes, from + 16 + 2 * t, 2);
    const int rows = from[48 + t];
    if (row_bytes > kRowBytes || rows > kMostRows || (row_bytes == 0) != (rows == 0))
      refuse("a tile of a size that is not known", code);
    state.tiles[t].rows = rows;
    state.tiles[t].row_bytes = row_bytes;
  }
  for (int i = 56; i < 64; ++i)
    if (from[i] != 0) refuse("tiles past the eighth", code);
  state.configured = true;
}

Tile& tile_at(int number, const uint8_t* code) {
  if (!state.configured) refuse("a tile used by a thread that has configured none", code);
  if (number >= kTiles || state.tiles[number].rows == 0) refuse("a tile that is not configured", code);
  return state.tiles[number];
}

void load(Tile& tile, uint64_t base, uint64_t stride) {
  memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; ++r) {
    memcpy(tile.data[r], reinterpret_cast<const void*>(base + static_cast<uint64_t>(r) * stride),
           static_cast<size_t>(tile.row_bytes));
  }
}

void store(const Tile& tile, uint64_t base, uint64_t stride) {
  for (int r = 0; r < tile.rows; ++r) {
    memcpy(reinterpret_cast<void*>(base + static_cast<uint64_t>(r) * stride), tile.data[r],
           static_cast<size_t>(tile.row_bytes));
  }
}

// For each element of C: the products of first and of second halves are summed apart by fused multiply-adds
// that start from zero, both sums are added, and that is added to C. All rounds to nearest even, subnormal
// numbers count as zero on both sides, and what MXCSR says does not matter.
[[gnu::noinline]] void multiply(Tile& c, const Tile& a, const Tile& b) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const int words = a.row_bytes / 4;
  for (int m = 0; m < c.rows; ++m) {
    __m512 first = _mm512_setzero_ps(), second = _mm512_setzero_ps();
    for (int k = 0; k < words; ++k) {
      int32_t word;
      memcpy(&word, a.data[m] + 4 * k, 4);
      const __m512i left = _mm512_set1_epi32(word), right = _mm512_load_si512(b.data[k]);
      first = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(left, 16)),
                              _mm512_castsi512_ps(_mm512_slli_epi32(right, 16)), first);
      second = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(left, upper)),
                               _mm512_castsi512_ps(_mm512_and_si512(right, upper)), second);
    }
    float* row = reinterpret_cast<float*>(c.data[m]);
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(first, second)));
  }
}

void product(const Instruction& i, const uint8_t* code) {
  Tile& c = tile_at(i.reg, code);
  const Tile &a = tile_at(i.rm, code), &b = tile_at(i.vvvv, code);
  if (i.reg == i.rm || i.reg == i.vvvv || i.rm == i.vvvv) refuse("a product of a tile with itself", code);
  if (a.rows != c.rows || a.row_bytes != 4 * b.rows || b.row_bytes != c.row_bytes)
    refuse("a product of tiles that do not fit", code);
  constexpr unsigned kNearestFlushed = 0x1f80 | 0x8000 | 0x0040;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNearestFlushed);
  asm volatile("" : : : "memory");
  multiply(c, a, b);
  asm volatile("" : : : "memory");
  _mm_setcsr(before);
}

void execute(const Instruction& i, const uint8_t* code) {
  const bool memory = i.rm < 0;
  if (i.opcode == 0x49 && i.prefix == 0 && memory) {
    configure(reinterpret_cast<const uint8_t*>(i.base), code);
  } else if (i.opcode == 0x49 && i.prefix == 0) {
    memset(&state, 0, sizeof(state));
  } else if (i.opcode == 0x49 && i.prefix == 3 && !memory) {
    memset(tile_at(i.reg, code).data, 0, sizeof(Tile::data));
  } else if (i.opcode == 0x4b && (i.prefix == 3 || i.prefix == 1) && memory) {
    load(tile_at(i.reg, code), i.base, i.index);
  } else if (i.opcode == 0x4b && i.prefix == 2 && memory) {
    store(tile_at(i.reg, code), i.base, i.index);
  } else if (i.opcode == 0x5c && i.prefix == 2 && !memory) {
    product(i, code);
  } else {
    refuse("no instruction of AMX-BF16", code);
  }
}

// A signal costs microseconds: one serves all tile instructions that follow each other.
void handle(int, siginfo_t*, void* argument) {
  ucontext_t* context = static_cast<ucontext_t*>(argument);
  greg_t& next = context->uc_mcontext.gregs[REG_RIP];
  Instruction i;
  int64_t count = 0;
  for (;; ++count) {
    const uint8_t* code = reinterpret_cast<const uint8_t*>(next);
    if (!decode(context, code, &i)) {
      if (count > 0) break;
      refuse("an illegal instruction", code);
    }
    execute(i, code);
    next += i.length;
  }
  emulated.fetch_add(count, std::memory_order_relaxed);
}

}  // namespace

extern "C" int amx_emulate() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr);
}

extern "C" int64_t amx_emulated() { return emulated.load(); }

// A product by the same arithmetic, without an instruction: 16 rows of 16 words each.
extern "C" void amx_product(const float* a, const float* b, float* c) {
  State own = {};
  const float* from[] = {c, a, b};
  for (int t = 0; t < 3; ++t) {
    own.tiles[t].rows = kMostRows;
    own.tiles[t].row_bytes = kRowBytes;
    memcpy(own.tiles[t].data, from[t], sizeof(Tile::data));
  }
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x1f80 | 0x8000 | 0x0040);
  asm volatile("" : : : "memory");
  multiply(own.tiles[0], own.tiles[1], own.tiles[2]);
  asm volatile("" : : : "memory");
  _mm_setcsr(before);
  memcpy(c, own.tiles[0].data, sizeof(Tile::data));
}
