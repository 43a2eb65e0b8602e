#include "team.h"

#include <time.h>

#include <algorithm>
#include <cstring>

#include "chunk_program.h"
#include "error.h"
#include "hashing.h"
#include "parallel.h"
#include "team_update.h"
#include "torch_interface.h"

namespace hotloop {
namespace {

// How long a thread without a job looks for one before it sleeps.
constexpr int64_t kIdleSpinNs = 3'000'000;
constexpr int kFails = 1, kSleeps = 2;

// One thread inside each operation of the calling thread; what it was before when this ends.
//
// torch gives a thread its number of OpenMP threads at the thread's first parallel loop, over one that was set
// before; asking brings that forward. MKL keeps a number of its own, 0: what the process has.
class OneThread {
 public:
  OneThread() {
    const TorchInterface& torch = torch_interface();
    uint32_t asked = 0;
    if (torch.torch_get_num_threads)
      call_torch<int32_t(uint32_t*)>(torch.torch_get_num_threads, &asked);
    before_ = set_operation_threads(1);
    set_mkl(1);
  }
  ~OneThread() {
    set_operation_threads(before_);
    set_mkl(0);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static void set_mkl(int count) {
    if (void* entry = torch_interface().MKL_Set_Num_Threads_Local) call_torch<int(int)>(entry, count);
  }

  int before_;
};

// Of the calling thread: what it computed, not how long that took.
int64_t cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

void sleep_for(int64_t ns) {
  const timespec pause{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  nanosleep(&pause, nullptr);
}

}  // namespace

Team::Team(const TeamOpen& given)
    : workers_(static_cast<int>(given.num_workers)),
      states_(new WorkerState[given.num_workers]),
      meeting_(static_cast<int>(given.num_workers)) {
  quota_.assign(static_cast<size_t>(workers_), 0);
  threads_.reserve(static_cast<size_t>(workers_));
  try {
    for (int w = 1; w < workers_; ++w) start_thread(w, given.placements[w]);
  } catch (...) {
    end_threads();
    throw;
  }
}

void Team::start_thread(int worker, const WorkerPlacement& placement) {
  std::unique_ptr<ThreadStart> start(new ThreadStart{this, worker, ThreadPlacement(placement)});
  pthread_t thread;
  if (pthread_create(&thread, nullptr, &Team::serve, start.get()) != 0)
    throw Error("the system must have a thread for each worker");
  start.release();  // The thread deletes it.
  threads_.push_back(thread);
}

Team::~Team() { end_threads(); }

void Team::end_threads() {
  closing_ = true;
  start_.change();
  for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
  threads_.clear();
}

void Team::detach() {
  closing_ = true;
  start_.change();
  for (const pthread_t thread : threads_) pthread_detach(thread);
  threads_.clear();
}

void Team::bind(const TeamBind& given) {
  if (given.programs) programs_.assign(given.programs, given.programs + workers_);
  chunks_ = given.num_chunks;
  weights_.assign(given.weights, given.weights + given.num_weights);
  buffers_.assign(given.buffers, given.buffers + given.num_buffers);
  loss_share_ = given.loss_share;
  keys_ = given.keys;
  chunk_losses_ = given.losses;
  failed_.assign(static_cast<size_t>(chunks_), 0);
}

void Team::balance(const int32_t* quota, int64_t steal_threshold, double hang_s) {
  quota_.assign(quota, quota + workers_);
  steal_threshold_ = steal_threshold;
  hang_ns_ = static_cast<int64_t>(hang_s * 1e9);
}

void Team::inject_fault(int worker, int kind, double seconds) {
  fault_kind_ = kind;
  fault_ns_ = static_cast<int64_t>(seconds * 1e9);
  fault_worker_ = worker;
}

void Team::fill(const TeamFill* fills, int64_t count) {
  int64_t steps_done = 0;
  call(Job{{}, fills, count}, &steps_done);
}

void Team::run(TeamRun* run) {
  run->steps_done = run->hangs = 0;
  try {
    call(Job{*run, nullptr, 0}, &run->steps_done);
  } catch (...) {
    run->hangs = hung_;
    throw;
  }
  for (int w = 0; w < workers_; ++w) run->times[w] = states_[w].times;
}

// One job on all workers, the calling thread being worker 0.
void Team::call(const Job& job, int64_t* steps_done) {
  if (is_given_up()) throw Error("a team that was given up cannot work");
  job_ = job;
  for (int w = 0; w < workers_; ++w) states_[w].times = {};
  assign_chunks();
  const OneThread inside;
  start_.change();
  if (!work(0, steps_done)) throw Error(failure_);
}

void* Team::serve(void* given) {
  const std::unique_ptr<ThreadStart> start(static_cast<ThreadStart*>(given));
  Team& team = *start->team;
  place_this_thread(start->placement, start->worker);
  const OneThread inside;
  int64_t steps_done = 0;
  for (uint32_t seen = 0;; ++seen) {
    team.start_.wait(seen, kIdleSpinNs);
    if (team.closing_ || !team.work(start->worker, &steps_done)) return nullptr;
  }
}

// What a worker does in one call. False: the team was given up.
bool Team::work(int me, int64_t* steps_done) {
  if (job_.fills) {
    fill_share(me);
    return meeting_.arrive();
  }
  WorkerTimes& times = states_[me].times;
  // Read once: the caller may prepare its next call while the others leave this one's last meeting.
  const int64_t steps = job_.run.steps;
  for (int64_t step = 0; step < steps; ++step) {
    run_chunks(me, step);
    int64_t began = now_ns();
    if (!(me ? meeting_.arrive() : meeting_.arrive([this] { look_for_hangs(); }))) return false;
    times.wait_ns += now_ns() - began;
    if (me == 0) finish_chunks(step);
    if (!meeting_.arrive()) return false;
    began = now_ns();
    if (!update(me, step)) return false;
    times.update_ns += now_ns() - began;
    if (me == 0) {
      for (int64_t j = 0; j < job_.run.num_counters; ++j) *job_.run.counters[j] += 1.0f;
      *steps_done = step + 1;
    }
    if (!meeting_.arrive()) return false;
  }
  return true;
}

void Team::assign_chunks() {
  int64_t at = 0;
  for (int w = 0; w < workers_; ++w) {
    states_[w].queue.assign(at, at + quota_[w]);
    at += quota_[w];
  }
}

// Its own first one, else the last one of whoever has most.
bool Team::take_chunk(int me, int64_t* chunk, bool* stolen) {
  *stolen = false;
  *chunk = states_[me].queue.take_first();
  if (*chunk != ChunkQueue::kNone) return true;
  *stolen = true;
  for (;;) {
    ChunkQueue* longest = nullptr;
    int64_t most = 0;
    for (int w = 0; w < workers_; ++w) {
      const int64_t left = states_[w].queue.left();
      if (w == me || left < steal_threshold_ || left <= most) continue;
      most = left;
      longest = &states_[w].queue;
    }
    if (!longest) return false;
    *chunk = longest->take_last(steal_threshold_);
    if (*chunk != ChunkQueue::kNone) return true;
  }
}

void Team::run_chunks(int me, int64_t step) {
  WorkerState& state = states_[me];
  const int64_t cpu_before = cpu_ns();
  int64_t chunk = 0;
  for (bool stolen = false; !is_given_up() && take_chunk(me, &chunk, &stolen);) {
    const int64_t began = now_ns();
    state.chunk_began_ns = began;
    const bool faulty = meets_fault(me);
    if (is_given_up()) return;
    failed_[chunk] = faulty || guarded([&] { run_chunk(me, chunk, step); }) != 0;
    state.chunk_began_ns = 0;
    state.times.busy_ns += now_ns() - began;
    state.times.chunks += 1;
    state.times.stolen += stolen;
  }
  state.times.cpu_ns += cpu_ns() - cpu_before;
}

void Team::run_chunk(int me, int64_t chunk, int64_t step) {
  const TeamRun& run = job_.run;
  if (run.keys)
    keys_[chunk] = static_cast<int64_t>(
        mix(static_cast<uint64_t>(run.keys[step]), static_cast<uint64_t>(chunk)));
  hotloop::run_chunk(programs_[static_cast<size_t>(me)], chunk, run.batch, step * chunks_ + chunk);
}

// For tests. True: the chunk fails.
bool Team::meets_fault(int me) {
  if (fault_worker_.load(std::memory_order_relaxed) != me) return false;
  fault_worker_ = -1;
  if (fault_kind_ == kSleeps) sleep_for(fault_ns_);
  return fault_kind_ == kFails;
}

// Worker 0, while the others wait.
void Team::finish_chunks(int64_t step) {
  double loss = 0;
  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
    // What another thread could not do is done again here, before anything is updated.
    if (failed_[chunk]) {
      try {
        run_chunk(0, chunk, step);
      } catch (const std::exception& error) {
        give_up((std::string("a chunk failed on two workers: ") + error.what()).c_str());
        throw Error(failure_);
      }
    }
    failed_[chunk] = 0;
    loss += loss_share_ * static_cast<double>(chunk_losses_[chunk]);
  }
  job_.run.losses[step] = static_cast<float>(loss);
  assign_chunks();
  combine(buffers_, chunks_);
}

bool Team::update(int me, int64_t step) {
  const TeamRun& run = job_.run;
  try {
    update_share(weights_, chunks_, me, workers_, run.tables ? run.tables + step * run.groups : nullptr);
    return true;
  } catch (const std::exception& error) {
    give_up(error.what());
    return false;
  }
}

void Team::fill_share(int me) {
  const ChunkQueue& own = states_[me].queue;
  for (int64_t j = 0; j < job_.num_fills; ++j) {
    const TeamFill& fill = job_.fills[j];
    const Range mine = fill.grain ? share(fill.rows, fill.grain, place_of(me))
                                  : Range{own.begin(), own.end()};
    const int64_t at = mine.begin * fill.row_bytes;
    const int64_t bytes = (mine.end - mine.begin) * fill.row_bytes;
    if (bytes <= 0) continue;
    if (fill.source) std::memcpy(fill.target + at, fill.source + at, static_cast<size_t>(bytes));
    else std::memset(fill.target + at, 0, static_cast<size_t>(bytes));
  }
}

// Worker 0, while it waits: gives the team up where another worker is at its chunk for too long.
void Team::look_for_hangs() {
  const int64_t now = now_ns();
  for (int w = 1; hang_ns_ && w < workers_; ++w) {
    const int64_t began = states_[w].chunk_began_ns;
    if (!began || now - began <= hang_ns_) continue;
    hung_ = true;
    give_up("every worker must end its chunk in time");
  }
}

void Team::give_up(const char* words) {
  if (!gives_up_.exchange(true)) {
    failure_ = words;
    meeting_.call_off();
  }
  while (!is_given_up()) pause_cpu();  // Another thread is just writing why.
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_team_open(hotloop::TeamOpen* open) {
  using namespace hotloop;
  return guarded([&] { open->team = new Team(*open); });
}

HOTLOOP_EXPORT void hotloop_team_close(void* opened) {
  auto* team = static_cast<hotloop::Team*>(opened);
  if (team->hung()) team->detach();
  else delete team;
}

HOTLOOP_EXPORT int32_t hotloop_team_bind(void* team, const hotloop::TeamBind* bind) {
  using namespace hotloop;
  return guarded([&] { static_cast<Team*>(team)->bind(*bind); });
}

HOTLOOP_EXPORT void hotloop_team_balance(void* team, const int32_t* quota, int64_t steal_threshold,
                                         double hang_s) {
  static_cast<hotloop::Team*>(team)->balance(quota, steal_threshold, hang_s);
}

HOTLOOP_EXPORT int32_t hotloop_team_fill(void* team, const hotloop::TeamFill* fills,
                                         int64_t count) {
  using namespace hotloop;
  return guarded([&] { static_cast<Team*>(team)->fill(fills, count); });
}

HOTLOOP_EXPORT int32_t hotloop_team_run(void* team, hotloop::TeamRun* run) {
  using namespace hotloop;
  return guarded([&] { static_cast<Team*>(team)->run(run); });
}

HOTLOOP_EXPORT void hotloop_team_inject_fault(void* team, int64_t worker, int64_t kind,
                                              double seconds) {
  static_cast<hotloop::Team*>(team)->inject_fault(static_cast<int>(worker), static_cast<int>(kind),
                                                  seconds);
}
