// Runs the CUDA kernels of csrc/cuda on a CPU, for tests. Only g++ is needed.
//
// Every CUDA thread of a block is a fibre with its own stack; one OS thread runs them in turn, each until it waits for others
// (barrier, warp collective, mbarrier) or ends. Blocks run one after another. VQFAST_EXECUTOR_ORDER=ascending|descending sets
// the order of fibres and blocks: code that needs a barrier which is not there is wrong in at least one of the two.
//
// What this finds: wrong values, missing barriers (shared memory starts as NaN, asynchronous copies land only when they are
// waited for), barriers and collectives that not all threads reach (abort with a message), everything that ASan and UBSan find.
// What it cannot find: weak memory ordering, true concurrency between blocks, speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if !defined(__x86_64__) || defined(VQFAST_EXECUTOR_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace vq::exec {

constexpr int kMaxThreads = 1024, kWarp = 32, kSlotBytes = 64;
constexpr size_t kStackBytes = 128 << 10;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "executor: %s\n", what.c_str());
  std::fflush(stderr);
  std::abort();
}

// ---- fibres: a switch costs a few instructions on x86-64, a system call elsewhere (or under VQFAST_EXECUTOR_UCONTEXT) --------

#if defined(__x86_64__) && !defined(VQFAST_EXECUTOR_UCONTEXT)
using Context = void*;

// Saves the callee-saved registers and the stack pointer in *from, and goes on where `to` was saved.
__attribute__((naked, noinline)) static void switch_context(Context* /*from*/, Context /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret\n");
}

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
  auto** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;                           // keeps the stack aligned as after a call
  *--slot = reinterpret_cast<void*>(entry);    // where `ret` goes
  for (int i = 0; i < 6; ++i) *--slot = nullptr;
  context = slot;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context& to) { swapcontext(from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  ::makecontext(&context, entry, 0);
}
#endif

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;  // bytes past `valid` become zero
};

struct Thread {
  Context context;
  dim3 index;
  int linear = 0;
  bool done = false;
  std::string waits;                             // what it waits for, for messages
  std::vector<std::vector<Copy>> copy_groups{1};  // cp.async: the last group is still open
  std::vector<std::function<void()>> wgmmas;     // wgmma: issued and not yet waited for
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// One collective of some lanes of a warp: each brings bytes, all see everybody's. Two buffers, since a fast lane may enter the
// next one while a slow lane still reads this one.
struct Collective {
  Collective(unsigned mask_, const char* what_) : mask(mask_), what(what_) {}
  unsigned mask;
  const char* what;
  unsigned char slots[2][kWarp][kSlotBytes];
  uint64_t generation = 0;
  int count = 0;
};

struct Barrier {
  uint64_t generation = 0;
  int arrived = 0, expected = 0, line = 0;
};

struct Shared {
  const void* key;
  std::unique_ptr<unsigned char[]> bytes;
};

struct Machine {
  std::vector<Thread> threads;
  std::unique_ptr<char[]> stacks;
  size_t stacks_for = 0;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  Thread* self = nullptr;
  dim3 grid, block, block_index;
  std::vector<std::unique_ptr<Collective>> warps[kMaxThreads / kWarp];  // one per mask and name that was used
  Barrier barriers[16];
  std::vector<Shared> shared;
  std::unique_ptr<unsigned char, decltype(&std::free)> dynamic{nullptr, &std::free};
  uint64_t progress = 0;  // grows whenever somebody may go on
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
#endif
};

inline Machine the_machine;
inline Machine& machine() { return the_machine; }

inline bool descending() {
  const char* order = std::getenv("VQFAST_EXECUTOR_ORDER");
  return order && std::strcmp(order, "descending") == 0;
}

inline std::string name_of(const Thread& t) { return "thread " + std::to_string(t.linear); }

// Back to the scheduler, until it is this fibre's turn again.
inline void yield() {
  Machine& m = machine();
  Thread* t = m.self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(t->done ? nullptr : &t->fake_stack, m.stack_bottom, m.stack_size);
#endif
  switch_context(&t->context, m.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t->fake_stack, &m.stack_bottom, &m.stack_size);
#endif
}

inline void fibre_entry() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.stack_bottom, &m.stack_size);
#endif
  (*m.body)();
  if (m.self->copy_groups.size() > 1 || !m.self->copy_groups.back().empty())
    fail(name_of(*m.self) + " ended with asynchronous copies that nobody waited for");
  if (!m.self->wgmmas.empty()) fail(name_of(*m.self) + " ended with wgmmas that nobody waited for");
  m.self->done = true;
  ++m.progress;
  yield();
}

inline void resume(Thread& t, char* stack) {
  Machine& m = machine();
  m.self = &t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&m.fake_stack, stack, kStackBytes);
#else
  (void)stack;
#endif
  switch_context(&m.scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(m.fake_stack, nullptr, nullptr);
#endif
}

// ---- blocks and launches ----------------------------------------------------------------------------------------------------

inline void report_deadlock() {
  Machine& m = machine();
  std::string text = "divergent barrier or deadlock in block " + std::to_string(m.block_index.x) + ": ";
  std::string first, last;
  for (Thread& t : m.threads) {
    std::string where = t.done ? "has ended" : t.waits;
    if (first.empty() || where != last) text += (first.empty() ? "" : "; ") + name_of(t) + " on: " + where;
    first = last = where;
  }
  fail(text);
}

inline void run_block(size_t dynamic_bytes) {
  Machine& m = machine();
  const int count = int(m.block.x * m.block.y * m.block.z);
  m.threads.clear();
  m.threads.resize(count);
  m.shared.clear();
  for (Barrier& b : m.barriers) b = Barrier();
  for (auto& warp : m.warps)
    for (auto& c : warp) c->count = 0;
  m.dynamic.reset();
  if (dynamic_bytes) {  // aligned as wgmma wants it, and not a byte longer, for ASan
    void* bytes = nullptr;
    if (posix_memalign(&bytes, 1024, dynamic_bytes)) fail("out of memory");
    m.dynamic.reset(static_cast<unsigned char*>(bytes));
    std::memset(bytes, 0xFF, dynamic_bytes);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(m.stacks.get(), count * kStackBytes);  // what earlier fibres left there
#endif
  for (int i = 0; i < count; ++i) {
    Thread& t = m.threads[i];
    t.linear = i;
    t.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
    make_context(t.context, m.stacks.get() + i * kStackBytes, kStackBytes, fibre_entry);
  }
  const bool down = descending();
  for (int left = count; left;) {
    const uint64_t before = m.progress;
    for (int i = 0; i < count; ++i) {
      const int k = down ? count - 1 - i : i;
      Thread& t = m.threads[k];
      if (t.done) continue;
      resume(t, m.stacks.get() + k * kStackBytes);
      left -= t.done;
    }
    if (left && m.progress == before) report_deadlock();
  }
}

inline void launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  const size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > kMaxThreads) fail("a block of " + std::to_string(count) + " threads");
  if (size_t(grid.x) * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid that no device accepts");
  if (dynamic_bytes > (227 << 10)) fail("more shared memory than any device has");
  if (m.stacks_for < count) {
    m.stacks.reset(new char[count * kStackBytes]);
    m.stacks_for = count;
  }
  m.grid = grid, m.block = block, m.body = &body;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t i = 0; i < blocks; ++i) {
    const size_t k = descending() ? blocks - 1 - i : i;
    m.block_index = dim3(unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y));
    run_block(dynamic_bytes);
  }
}

inline unsigned char* dynamic_shared() { return machine().dynamic.get(); }

// Static shared memory: one object per block and place in the source, filled with NaN; its heap block has ASan's red zones.
template <class T>
T& block_shared(const void* key) {
  Machine& m = machine();
  for (Shared& s : m.shared)
    if (s.key == key) return *reinterpret_cast<T*>(s.bytes.get());
  m.shared.push_back({key, std::unique_ptr<unsigned char[]>(new unsigned char[sizeof(T)])});
  std::memset(m.shared.back().bytes.get(), 0xFF, sizeof(T));
  return *reinterpret_cast<T*>(m.shared.back().bytes.get());
}

// ---- synchronisation --------------------------------------------------------------------------------------------------------

inline void barrier(int id, int expected, int line) {
  Machine& m = machine();
  Barrier& b = m.barriers[id];
  Thread& t = *m.self;
  t.waits = "barrier " + std::to_string(id) + " in line " + std::to_string(line);
  if (b.arrived && (b.line != line && id == 0))
    fail("divergent barrier: " + name_of(t) + " waits in line " + std::to_string(line) + ", others in line " + std::to_string(b.line));
  if (b.arrived && b.expected != expected) fail("barrier " + std::to_string(id) + " with different thread counts");
  if (id == 0)
    for (Thread& other : m.threads)
      if (other.done) fail("divergent barrier: " + name_of(other) + " has ended, " + name_of(t) + " waits in line " + std::to_string(line));
  b.line = line, b.expected = expected;
  if (++b.arrived == expected) {
    b.arrived = 0;
    ++b.generation;
    ++m.progress;
    return;
  }
  for (const uint64_t generation = b.generation; b.generation == generation;) yield();
}

using Slots = const unsigned char (*)[kSlotBytes];

// Brings `bytes` bytes from each lane in `mask` and returns everybody's. Lanes outside the mask may be elsewhere.
inline Slots exchange_warp(unsigned mask, const char* what, const void* in, size_t bytes) {
  Machine& m = machine();
  Thread& t = *m.self;
  const int lane = t.linear % kWarp;
  if (!(mask >> lane & 1)) fail(name_of(t) + " calls " + what + " with a mask that leaves it out");
  t.waits = what;
  auto& warp = m.warps[t.linear / kWarp];
  auto same = [&](auto& c) { return c->mask == mask && c->what == what; };
  auto found = std::find_if(warp.begin(), warp.end(), same);
  if (found == warp.end()) found = warp.insert(warp.end(), std::make_unique<Collective>(mask, what));
  Collective& c = **found;
  const uint64_t generation = c.generation;
  std::memcpy(c.slots[generation & 1][lane], in, bytes);
  if (++c.count == __builtin_popcount(mask)) {
    c.count = 0;
    ++c.generation;
    ++m.progress;
  }
  while (c.generation == generation) yield();
  return c.slots[generation & 1];
}

template <class T>
T from_lane(Slots slots, int lane) {
  T value;
  std::memcpy(&value, slots[lane], sizeof(T));
  return value;
}

}  // namespace vq::exec

#define threadIdx (::vq::exec::machine().self->index)
#define blockIdx (::vq::exec::machine().block_index)
#define blockDim (::vq::exec::machine().block)
#define gridDim (::vq::exec::machine().grid)
