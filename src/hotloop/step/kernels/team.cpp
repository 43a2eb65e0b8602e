// A team of threads that trains on chunks of a batch: each chunk runs the compiled forward and backward
// on one thread, then every thread updates its share of the weights. Part of shim.cpp.
//
// Whatever the number of threads and whoever ran a chunk, sums are taken in the order of the chunks, so
// results are the same bits.

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "seat.h"

// torch gives a thread its number of OpenMP threads at the thread's first parallel loop, over one that
// was set before; asking brings that forward. MKL keeps a number of its own. Weak: either may be absent.
namespace at {
int get_num_threads() __attribute__((weak));
}
extern "C" int MKL_Set_Num_Threads_Local(int) __attribute__((weak));

namespace {

// One thread inside each operation; `set_before` undoes it.
int one_thread() {
  const int before = at::get_num_threads ? at::get_num_threads() : omp_get_max_threads();
  omp_set_num_threads(1);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
  return before;
}

void set_before(int before) {
  omp_set_num_threads(before);
  if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(0);  // What the process has.
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// Of the calling thread: what it computed, not how long that took.
int64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

constexpr int kSpins = 4000;      // Then the thread sleeps.
constexpr int64_t kNapNs = 20'000'000;
constexpr int64_t kBlockFloats = 1024;

// How one weight gets its gradient and its update; the order is that of team.py.
struct Weight {
  int64_t factored;  // Else the chunks' gradients lie `slot_stride` floats apart from `left` on.
  int64_t group;
  int64_t rows, cols;  // Of the weight; 1 and all elements where it is not factored.
  int64_t depth;       // Rows of the factors of all chunks together.
  float *weight, *s1, *s2, *left, *right;
  int64_t slot_stride;
  float* gradient;  // Where the sum goes if the update is not ours, else null.
};

// A buffer that the model changes: chunks work on copies, and the mean of these becomes the new value.
struct Buffer {
  int64_t bytes, is_float;
  char *shared, *copies;
  int64_t copy_stride;
};

// What one worker does: chunks still to run, `begin` in the upper half, and what it has done.
struct alignas(64) Lane {
  std::atomic<uint64_t> range{0};
  std::atomic<int64_t> since_ns{0};  // When the chunk under way began; 0: none is.
  int64_t chunks = 0, stolen = 0, busy_ns = 0, wait_ns = 0, update_ns = 0, cpu_ns = 0;
};

// Memory that workers write before anybody else does: each its share of the rows of a weight, or of the
// chunks that it begins with. The order is that of team.py.
struct Fill {
  char* to;
  const char* from;  // Null: zeros.
  int64_t rows, row_bytes;
  int64_t grain;  // Shares are whole multiples of so many rows; 0: rows are chunks.
};

struct Job {
  const int64_t *x, *y;
  int64_t x_step, y_step, steps;
  const double* tables;
  int64_t table_doubles;
  float* losses;
  float** counters;
  int64_t num_counters;
  const int64_t* keys;  // Of each step, where chunks draw random numbers.
  const Fill* fills;    // Not null: no steps, but this.
  int64_t num_fills;
};

struct Team {
  Run run = nullptr;
  std::vector<Container> containers;
  std::vector<std::thread> threads;
  std::unique_ptr<Lane[]> lanes;
  int workers = 1, chunks = 0;
  std::vector<std::vector<AtenTensorHandle>> bound;  // For each chunk, all inputs but x and y.
  std::vector<Weight> weights;
  std::vector<Buffer> buffers;
  std::vector<double> shares;  // Of the samples, for each chunk.
  int64_t* keys = nullptr;     // Of each chunk, where it draws random numbers.
  std::vector<int> quota;      // Chunks each worker begins with.
  std::vector<float> chunk_losses;
  std::vector<char> failed;
  int steal_threshold = 1;
  int64_t hang_ns = 0;

  Job job{};
  std::atomic<int64_t> started{0};
  std::atomic<bool> closing{false}, abandoned{false};
  std::atomic<int> arrived{0};
  std::atomic<uint32_t> generation{0};
  std::atomic<int> sleepers{0};
  std::mutex mutex;
  std::condition_variable wake;

  // For tests: worker `fault_worker` fails (1) or sleeps (2) at its next chunk.
  std::atomic<int> fault_worker{-1}, fault_kind{0};
  std::atomic<int64_t> fault_ns{0};
};

// Sleeps while `word` is `seen`, or for a nap.
void nap(std::atomic<uint32_t>& word, uint32_t seen) {
  const timespec limit{0, kNapNs};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, &limit);
}

void wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX);
}

// Whether a worker is at its chunk for too long.
bool hangs(const Team& team) {
  const int64_t now = team.hang_ns ? now_ns() : 0;
  for (int w = 1; team.hang_ns && w < team.workers; ++w) {
    const int64_t since = team.lanes[w].since_ns.load();
    if (since && now - since > team.hang_ns) return true;
  }
  return false;
}

// Waits for all workers. False: the team was given up. Only worker 0 looks for those who hang.
//
// Whoever waits for long sleeps: a thread that yields in a loop falls behind every other program on its
// core, and one that shares its core with the worker it waits for keeps it from running.
bool meet(Team& team, bool watch) {
  const uint32_t seen = team.generation.load();
  if (team.arrived.fetch_add(1) + 1 == team.workers) {
    team.arrived.store(0);
    team.generation.fetch_add(1);
    if (team.sleepers.load()) wake_all(team.generation);
    return !team.abandoned;
  }
  for (int spins = 0; spins < kSpins; ++spins) {
    if (team.generation.load(std::memory_order_acquire) != seen) return true;
    if (team.abandoned) return false;
    pause_cpu();
  }
  team.sleepers.fetch_add(1);
  while (team.generation.load() == seen && !team.abandoned) {
    nap(team.generation, seen);
    if (watch && team.generation.load() == seen && hangs(team)) team.abandoned = true;
  }
  team.sleepers.fetch_sub(1);
  return team.generation.load() != seen;
}

// The next chunk for worker `me`: its own first one, else another's last one. -1: none is left.
int next_chunk(Team& team, int me, bool* stolen) {
  Lane& own = team.lanes[me];
  for (uint64_t range = own.range.load();;) {
    const uint32_t begin = range >> 32, end = uint32_t(range);
    if (begin >= end) break;
    if (own.range.compare_exchange_weak(range, uint64_t(begin + 1) << 32 | end)) return int(begin);
  }
  for (;;) {
    int victim = -1;
    uint32_t most = 0;
    uint64_t seen = 0;
    for (int w = 0; w < team.workers; ++w) {
      const uint64_t range = team.lanes[w].range.load();
      const uint32_t begin = range >> 32, end = uint32_t(range);
      const uint32_t left = end > begin ? end - begin : 0;
      if (w != me && left >= uint32_t(team.steal_threshold) && left > most) {
        most = left;
        victim = w;
        seen = range;
      }
    }
    if (victim < 0) return -1;
    const uint32_t begin = seen >> 32, end = uint32_t(seen);
    if (team.lanes[victim].range.compare_exchange_strong(seen, uint64_t(begin) << 32 | (end - 1))) {
      *stolen = true;
      return int(end - 1);
    }
  }
}

// mix of data/hashing.py.
uint64_t mix64(uint64_t word) {
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
  return word ^ (word >> 31);
}

uint64_t mix(uint64_t one, uint64_t other) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  return mix64(mix64(mix64(one + kGolden)) + mix64(other + kGolden));
}

int run_chunk(Team& team, int me, int chunk, int64_t step) {
  const Job& job = team.job;
  if (job.keys) team.keys[chunk] = int64_t(mix(uint64_t(job.keys[step]), uint64_t(chunk)));
  for (const Buffer& b : team.buffers)
    std::memcpy(b.copies + chunk * b.copy_stride, b.shared, b.bytes);
  const std::vector<AtenTensorHandle>& fixed = team.bound[chunk];
  std::vector<AtenTensorHandle> inputs(fixed.size() + 2);
  for (size_t j = 0; j < fixed.size(); ++j)
    TRY(aoti_torch_new_tensor_handle(fixed[j], &inputs[j]));
  const int64_t at = step * team.chunks + chunk;
  std::vector<int64_t> x(job.x, job.x + 3 + 2 * job.x[2]), y(job.y, job.y + 3 + 2 * job.y[2]);
  x[0] += at * job.x_step;
  y[0] += at * job.y_step;
  int error = 0;
  tensor_from(x.data(), &inputs[fixed.size()], &error);
  if (error) return 1;
  tensor_from(y.data(), &inputs[fixed.size() + 1], &error);
  if (error) return 1;
  AtenTensorHandle output = nullptr;
  TRY(team.run(team.containers[me], inputs.data(), inputs.size(), &output, 1, nullptr, nullptr));
  void* loss = nullptr;
  TRY(aoti_torch_get_data_ptr(output, &loss));
  team.chunk_losses[chunk] = *static_cast<float*>(loss);
  aoti_torch_delete_tensor_object(output);
  return 0;
}

void run_chunks(Team& team, int me, int64_t step) {
  Lane& lane = team.lanes[me];
  const int64_t cpu_before = cpu_ns();
  for (;;) {
    bool stolen = false;
    const int chunk = next_chunk(team, me, &stolen);
    if (chunk < 0) {
      lane.cpu_ns += cpu_ns() - cpu_before;
      return;
    }
    const int64_t began = now_ns();
    lane.since_ns.store(began);
    bool fault = team.fault_worker.load(std::memory_order_relaxed) == me;
    if (fault) {
      team.fault_worker = -1;
      if (team.fault_kind == 2) {
        const int64_t ns = team.fault_ns;
        timespec pause{time_t(ns / 1000000000), long(ns % 1000000000)};
        nanosleep(&pause, nullptr);
        if (team.abandoned) return;
        fault = false;
      }
    }
    team.failed[chunk] = fault || run_chunk(team, me, chunk, step) != 0;
    const int64_t ended = now_ns();
    lane.since_ns.store(0);
    lane.busy_ns += ended - began;
    lane.chunks += 1;
    lane.stolen += stolen;
  }
}

// sum[i] = the chunks' gradients, added in the order of the chunks.
void add_slots(const Weight& w, int chunks, int64_t at, int64_t count, float* sum) {
  std::memcpy(sum, w.left + at, count * sizeof(float));
  for (int c = 1; c < chunks; ++c) {
    const float* from = w.left + c * w.slot_stride + at;
    for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
  }
}

void update_share(Team& team, int me, const double* table) {
  for (const Weight& w : team.weights) {
    const hotloop_update u = table ? rule(table + w.group * kColumns) : hotloop_update{};
    if (w.factored) {
      const Range mine = share(w.rows, kRows, me, team.workers);
      const int64_t rows = mine.end - mine.begin, at = mine.begin * w.cols;
      if (rows <= 0) continue;
      if (w.gradient)
        hotloop_gemm_f32(rows, w.cols, w.depth, w.left + mine.begin, 1, w.rows, w.right, w.cols, 1,
                         w.gradient + at, w.cols, nullptr, 0, nullptr, 0, 1);
      else
        hotloop_gemm_update_f32(rows, w.cols, w.depth, w.left + mine.begin, 1, w.rows, w.right,
                                w.cols, 1, w.weight + at, w.cols, w.s1 ? w.s1 + at : nullptr,
                                w.s2 ? w.s2 + at : nullptr, w.cols, nullptr, &u, 1.0f, 1);
      continue;
    }
    float sum[kBlockFloats];
    const Range mine = share(w.cols, 16, me, team.workers);
    for (int64_t at = mine.begin; at < mine.end; at += kBlockFloats) {
      const int64_t count = std::min(kBlockFloats, mine.end - at);
      add_slots(w, team.chunks, at, count, w.gradient ? w.gradient + at : sum);
      if (!w.gradient)
        hotloop_update_f32(count, w.weight + at, sum, w.s1 ? w.s1 + at : nullptr,
                           w.s2 ? w.s2 + at : nullptr, &u, 1.0f, 1);
    }
  }
}

void combine_buffers(Team& team) {
  for (const Buffer& b : team.buffers) {
    if (!b.is_float) {
      std::memcpy(b.shared, b.copies, b.bytes);
      continue;
    }
    float* shared = reinterpret_cast<float*>(b.shared);
    for (int64_t i = 0; i < b.bytes / 4; ++i) {
      double sum = 0;
      for (int c = 0; c < team.chunks; ++c)
        sum += team.shares[c] * reinterpret_cast<float*>(b.copies + c * b.copy_stride)[i];
      shared[i] = float(sum);
    }
  }
}

void assign(Team& team) {
  uint32_t at = 0;
  for (int w = 0; w < team.workers; ++w) {
    const uint32_t end = at + team.quota[w];
    team.lanes[w].range = uint64_t(at) << 32 | end;
    at = end;
  }
}

void fill_share(Team& team, int me) {
  const uint64_t range = team.lanes[me].range.load();
  for (int64_t j = 0; j < team.job.num_fills; ++j) {
    const Fill& fill = team.job.fills[j];
    const Range mine = fill.grain ? share(fill.rows, fill.grain, me, team.workers)
                                  : Range{int64_t(range >> 32), int64_t(uint32_t(range))};
    const int64_t at = mine.begin * fill.row_bytes, bytes = (mine.end - mine.begin) * fill.row_bytes;
    if (bytes <= 0) continue;
    if (fill.from) std::memcpy(fill.to + at, fill.from + at, bytes);
    else std::memset(fill.to + at, 0, bytes);
  }
}

// What a worker does in one call; worker 0 is the caller. 0 done, 1 failed, 2 a worker hangs.
int work(Team& team, int me, int64_t* steps_done) {
  Lane& lane = team.lanes[me];
  if (team.job.fills) {
    fill_share(team, me);
    return meet(team, false) ? 0 : 1;
  }
  // Read once: the caller may prepare its next call while the others leave this one's last meeting.
  const int64_t steps = team.job.steps;
  for (int64_t step = 0; step < steps; ++step) {
    run_chunks(team, me, step);
    int64_t began = now_ns();
    if (!meet(team, me == 0)) return 2;
    lane.wait_ns += now_ns() - began;
    if (me == 0) {
      double loss = 0;
      for (int c = 0; c < team.chunks; ++c) {
        // What another thread could not do is done again here, before anything is updated.
        if (team.failed[c] && run_chunk(team, 0, c, step) != 0) {
          team.abandoned = true;
          return 1;
        }
        team.failed[c] = 0;
        loss += team.shares[c] * team.chunk_losses[c];
      }
      team.job.losses[step] = float(loss);
      assign(team);
      combine_buffers(team);
    }
    if (!meet(team, false)) return 1;
    began = now_ns();
    const double* tables = team.job.tables;
    update_share(team, me, tables ? tables + step * team.job.table_doubles : nullptr);
    lane.update_ns += now_ns() - began;
    if (me == 0) {
      for (int64_t j = 0; j < team.job.num_counters; ++j) *team.job.counters[j] += 1.0f;
      *steps_done = step + 1;
    }
    if (!meet(team, false)) return 1;
  }
  return 0;
}

void serve(Team* team, int me, Seat seat) {
  sit(seat, me);
  one_thread();
  threads = 1;
  int64_t seen = 0, done = 0;
  for (;;) {
    for (int spins = 0; team->started == seen && !team->closing && spins < 50 * kSpins; ++spins)
      pause_cpu();
    {
      std::unique_lock<std::mutex> lock(team->mutex);
      team->wake.wait(lock, [&] { return team->started != seen || team->closing; });
    }
    if (team->closing || team->abandoned) return;
    ++seen;
    if (work(*team, me, &done) != 0) return;
  }
}

// One call on all workers, the calling thread being worker 0.
int call(Team* team, const Job& job, int64_t* steps_done) {
  team->job = job;
  for (int w = 0; w < team->workers; ++w) {
    Lane& lane = team->lanes[w];
    lane.chunks = lane.stolen = lane.busy_ns = lane.wait_ns = lane.update_ns = lane.cpu_ns = 0;
  }
  assign(*team);
  const int before = one_thread();
  const int32_t threads_before = threads;
  threads = 1;
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    team->started.fetch_add(1);
  }
  team->wake.notify_all();
  const int result = work(*team, 0, steps_done);
  set_before(before);
  threads = threads_before;
  return result;
}

}  // namespace

// `seats`: for each worker as for next_seat. Worker 0 is the thread that calls hotloop_team_run, and seats itself.
EXPORT void* hotloop_team_open(const char* path, int32_t workers, const int32_t* seats,
                               char* message, int64_t message_bytes) {
  auto team = std::make_unique<Team>();
  team->workers = workers;
  team->lanes.reset(new Lane[workers]);
  for (int w = 0; w < workers; ++w) {
    auto* program = static_cast<Program*>(hotloop_program_open(path, message, message_bytes));
    if (!program) return nullptr;
    team->run = program->run;
    team->containers.push_back(program->container);
    delete program;
  }
  Team* opened = team.release();
  for (int w = 0; w < workers; ++w) {
    const Seat seat = next_seat(&seats);
    if (w) opened->threads.emplace_back(serve, opened, w, seat);
  }
  return opened;
}

// Ends the threads. A team that was given up is left as it is: a thread that hangs still uses it.
EXPORT void hotloop_team_close(void* opened) {
  auto* team = static_cast<Team*>(opened);
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    team->closing = true;
  }
  team->wake.notify_all();
  for (std::thread& thread : team->threads) {
    if (team->abandoned) thread.detach();
    else thread.join();
  }
  if (team->abandoned) {
    team->threads.clear();
    return;
  }
  for (auto& inputs : team->bound)
    for (AtenTensorHandle handle : inputs) aoti_torch_delete_tensor_object(handle);
  delete team;
}

// tensors: for each chunk in turn, `count` inputs; weights and buffers: the structs above.
EXPORT int hotloop_team_bind(void* opened, int32_t chunks, const int64_t* tensors, int64_t count,
                             const Weight* weights, int64_t num_weights, const Buffer* buffers,
                             int64_t num_buffers, const double* shares, int64_t* keys) {
  auto* team = static_cast<Team*>(opened);
  for (auto& inputs : team->bound)
    for (AtenTensorHandle handle : inputs) aoti_torch_delete_tensor_object(handle);
  team->bound.assign(chunks, {});
  for (auto& inputs : team->bound)
    for (int64_t i = 0; i < count; ++i) {
      AtenTensorHandle handle = nullptr;
      int error = 0;
      tensors = tensor_from(tensors, &handle, &error);
      if (error) return 1;
      inputs.push_back(handle);
    }
  team->chunks = chunks;
  team->weights.assign(weights, weights + num_weights);
  team->buffers.assign(buffers, buffers + num_buffers);
  team->shares.assign(shares, shares + chunks);
  team->keys = keys;
  team->chunk_losses.resize(chunks);
  team->failed.assign(chunks, 0);
  return 0;
}

// Chunks that each worker begins a step with, when it may take another's, and what counts as hanging.
EXPORT void hotloop_team_balance(void* opened, const int32_t* quota, int32_t steal_threshold,
                                 double hang_s) {
  auto* team = static_cast<Team*>(opened);
  team->quota.assign(quota, quota + team->workers);
  team->steal_threshold = steal_threshold;
  team->hang_ns = int64_t(hang_s * 1e9);
}

// Losses of chunks that ran elsewhere: with no quota, a step is the update alone.
EXPORT void hotloop_team_losses(void* opened, const float* losses) {
  auto* team = static_cast<Team*>(opened);
  std::copy(losses, losses + team->chunk_losses.size(), team->chunk_losses.begin());
}

EXPORT void hotloop_team_fault(void* opened, int32_t worker, int32_t kind, double seconds) {
  auto* team = static_cast<Team*>(opened);
  team->fault_kind = kind;
  team->fault_ns = int64_t(seconds * 1e9);
  team->fault_worker = worker;
}

// Has workers write memory for the first time, see Fill. 0 done, 1 failed.
EXPORT int hotloop_team_fill(void* opened, const Fill* fills, int64_t count) {
  auto* team = static_cast<Team*>(opened);
  if (team->abandoned) return 1;
  Job job{};
  job.fills = fills;
  job.num_fills = count;
  int64_t done = 0;
  return call(team, job, &done);
}

// Steps on x and y as for hotloop_program_run, x and y described for one chunk. `stats`: for each worker
// chunks, stolen, busy, waited, update and, while busy, processor nanoseconds of this call. 0 done, 1 failed, 2 a worker hangs;
// then the weights are those after `steps_done` steps, and the team must be closed.
EXPORT int hotloop_team_run(void* opened, const int64_t* batch, int64_t x_step, int64_t y_step,
                            int64_t steps, const double* tables, int64_t table_doubles,
                            float* losses, float** counters, int64_t num_counters,
                            const int64_t* keys, int64_t* stats, int64_t* steps_done) {
  auto* team = static_cast<Team*>(opened);
  *steps_done = 0;
  if (team->abandoned) return 1;
  const Job job{batch,  batch + 3 + 2 * batch[2], x_step,   y_step,       steps,   tables,
                table_doubles, losses, counters, num_counters, keys, nullptr, 0};
  const int result = call(team, job, steps_done);
  for (int w = 0; w < team->workers; ++w) {
    const Lane& lane = team->lanes[w];
    const int64_t row[] = {lane.chunks,  lane.stolen,    lane.busy_ns,
                           lane.wait_ns, lane.update_ns, lane.cpu_ns};
    std::memcpy(stats + w * 6, row, sizeof row);
  }
  return result;
}
