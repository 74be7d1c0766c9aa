// Runs csrc/cuda/ on a CPU: what its kernels and launches use of CUDA, no more.
//
// The threads of a block are fibers of one thread. Each runs to its next barrier or shuffle; an exchange is complete
// when all threads (of the block, or of the warp) stand at the same line of the source, and anything else is an error.
// So that mistakes show: shared memory begins as NaN and ends in a guard, asynchronous copies arrive only when they are
// waited for and leave NaN until then, and the order of the threads and of the blocks can be changed.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define CAPS_LAUNCH(kernel, grid, block, shared, stream) shim::bind(kernel, grid, block, shared, stream)
#define CAPS_SHARED(name) unsigned char* const name = shim::block.shared.data() + shim::block.offset
#define CAPS_READ_THREAD(name) const unsigned name = threadIdx.x
#define SHIM_TEXT(x) #x
#define SHIM_PLACE(line) __FILE__ ":" SHIM_TEXT(line)
#define __syncthreads() shim::wait(false, SHIM_PLACE(__LINE__))
#define __syncwarp() (void)0
#define __shfl_xor_sync(mask, value, offset) shim::shuffle_xor(mask, value, offset, SHIM_PLACE(__LINE__))
#define threadIdx (shim::block.threads[shim::block.running].index)
#define blockIdx shim::block.index
#define blockDim shim::block.size
#define gridDim shim::block.grid

namespace shim {

struct Index {
  unsigned x = 0;
};

struct Copy {
  void* to;
  const void* from;
  size_t size, zeros;
  bool committed;
};

struct Thread {
  Index index;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  enum { ready, at_barrier, at_shuffle, done } state = ready;
  std::string_view place;  // of the barrier or shuffle at which it waits, file:line
  int shuffles = 0;
  double exchange[2] = {};
  std::vector<Copy> copies;
};

constexpr int warp = 32, guard = 4096;
constexpr size_t stack_size = 256 << 10;

inline unsigned turns = 0;  // of threads and blocks: 0 ascending, 1 descending, else the seed of a shuffle

struct Block {
  Index index, size, grid;
  std::vector<Thread> threads;
  int running = 0;
  std::vector<unsigned char> shared;
  size_t offset = 0;  // of the first byte, so that it lies at a multiple of 16
  std::function<void()> body;
  ucontext_t scheduler;
  std::string error;
};
inline Block block;

[[noreturn]] inline void fail(const std::string& text) { throw std::runtime_error("shim: " + text); }

inline void leave(decltype(Thread::state) state) {
  Thread& thread = block.threads[block.running];
  thread.state = state;
  swapcontext(&thread.context, &block.scheduler);
}

inline void wait(bool shuffle, std::string_view place) {
  block.threads[block.running].place = place;
  leave(shuffle ? Thread::at_shuffle : Thread::at_barrier);
}

template <class Real>
Real shuffle_xor(unsigned mask, Real value, int offset, std::string_view place) {
  const int own = block.running, parity = block.threads[own].shuffles++ % 2;
  if (mask != 0xffffffffu && block.error.empty())
    block.error = "a shuffle of a part of a warp";
  block.threads[own].exchange[parity] = value;
  wait(true, place);
  return static_cast<Real>(block.threads[own ^ offset].exchange[parity]);
}

inline void run_thread() {
  try {
    block.body();
  } catch (const std::exception& error) {
    block.error = error.what();
  }
  for (;;)
    leave(Thread::done);
}

// Lets the threads [first, first + count) go on if all of them stand at the same place; false if they do not.
inline bool release(int first, int count, decltype(Thread::state) state) {
  for (int i = first; i < first + count; ++i)
    if (block.threads[i].state != state || block.threads[i].place != block.threads[first].place)
      return false;
  for (int i = first; i < first + count; ++i)
    block.threads[i].state = Thread::ready;
  return true;
}

inline std::vector<unsigned> order(unsigned count, unsigned salt) {
  std::vector<unsigned> all(count);
  std::iota(all.begin(), all.end(), 0);
  if (turns == 1)
    std::reverse(all.begin(), all.end());
  else if (turns > 1)
    std::shuffle(all.begin(), all.end(), std::mt19937(turns + salt));
  return all;
}

inline void run_block(unsigned index, size_t shared) {
  const int count = block.size.x;
  block.index.x = index;
  block.error.clear();
  block.shared.assign(shared + 16 + guard, 0xff);
  block.offset = -reinterpret_cast<uintptr_t>(block.shared.data()) % 16;
  for (int i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack)
      thread.stack = std::make_unique<char[]>(stack_size);
    thread.index.x = i;
    thread.state = Thread::ready;
    thread.shuffles = 0;
    thread.copies.clear();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = stack_size;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
  }
  const auto in_turn = order(count, index);
  for (bool finished = false; !finished;) {
    for (unsigned i : in_turn)
      if (block.threads[i].state == Thread::ready) {
        block.running = i;
        swapcontext(&block.scheduler, &block.threads[i].context);
      }
    if (!block.error.empty())
      fail(block.error);
    finished = std::all_of(block.threads.begin(), block.threads.begin() + count,
                           [](const Thread& thread) { return thread.state == Thread::done; });
    bool progress = finished || release(0, count, Thread::at_barrier);
    for (int first = 0; first < count; first += warp)
      progress |= release(first, std::min(warp, count - first), Thread::at_shuffle);
    if (!progress) {
      std::string places;
      for (int i = 0; i < count; ++i)
        if (i == 0 || block.threads[i].state != block.threads[i - 1].state ||
            block.threads[i].place != block.threads[i - 1].place)
          places += " thread " + std::to_string(i) + (block.threads[i].state == Thread::done ? " has ended,"
                                                      : block.threads[i].state == Thread::at_shuffle
                                                          ? " is at a shuffle in "
                                                          : " is at a barrier in ") +
                    (block.threads[i].state == Thread::done ? "" : std::string(block.threads[i].place) + ",");
      fail("threads diverge:" + places + " block " + std::to_string(index));
    }
  }
  for (int i = 0; i < count; ++i)
    if (!block.threads[i].copies.empty())
      fail("a thread ended with copies in flight");
  for (size_t at = block.offset + shared; at < block.shared.size(); ++at)
    if (block.shared[at] != 0xff)
      fail("shared memory written beyond its " + std::to_string(shared) + " bytes");
}

template <class... Parameters>
auto bind(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, void*) {
  return [=](const auto&... arguments) {
    if (threads == 0 || threads > 1024 || threads % warp)
      fail("a block of " + std::to_string(threads) + " threads");
    if (shared > 48 << 10)
      fail(std::to_string(shared) + " bytes of shared memory, more than some GPUs have");
    const std::tuple<Parameters...> values(arguments...);
    block.size.x = threads;
    block.grid.x = blocks;
    if (block.threads.size() < threads)
      block.threads.resize(threads);
    block.body = [&] { std::apply(kernel, values); };
    for (unsigned index : order(blocks, 0))
      run_block(index, shared);
  };
}

}  // namespace shim

// ---- asynchronous copies -------------------------------------------------------------------------------------------

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  const bool aligned = uintptr_t(to) % size == 0 && (zeros == size || uintptr_t(from) % size == 0);
  const unsigned char* shared = shim::block.shared.data() + shim::block.offset;
  if (!aligned || (size != 4 && size != 8 && size != 16))
    shim::block.error = "a copy of " + std::to_string(size) + " bytes that is not aligned";
  if (to < shared || static_cast<unsigned char*>(to) + size > shim::block.shared.data() + shim::block.shared.size())
    shim::block.error = "a copy to outside of shared memory";
  std::memset(to, 0xff, size);
  shim::block.threads[shim::block.running].copies.push_back({to, from, size, zeros, false});
}

inline void __pipeline_commit() {
  for (shim::Copy& copy : shim::block.threads[shim::block.running].copies)
    copy.committed = true;
}

inline void __pipeline_wait_prior(int) {
  auto& copies = shim::block.threads[shim::block.running].copies;
  for (const shim::Copy& copy : copies)
    if (copy.committed) {
      std::memcpy(copy.to, copy.from, copy.size - copy.zeros);
      std::memset(static_cast<char*>(copy.to) + copy.size - copy.zeros, 0, copy.zeros);
    }
  copies.erase(std::remove_if(copies.begin(), copies.end(), [](const shim::Copy& copy) { return copy.committed; }),
               copies.end());
}

// ---- the runtime ---------------------------------------------------------------------------------------------------
//
// No attribute of a device or of a kernel is here: what a result is made of depends on the sizes alone.

using std::min;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  return std::memset(to, value, size), cudaSuccess;
}
