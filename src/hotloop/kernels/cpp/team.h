// A team of threads that trains on chunks of a batch: each chunk runs the program of forward and backward on one
// thread, then every thread updates its share of the weights.
//
// Whatever the number of threads and whoever ran a chunk, sums are taken in the order of the chunks, so results
// are the same bits.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#include "chunk_queue.h"
#include "futex.h"
#include "meeting.h"
#include "worker_placement.h"

namespace hotloop {

class Team {
 public:
  // Starts the threads. Throws Error.
  explicit Team(const TeamOpen& given);

  // Ends them. Only where none hung: a thread that hangs still uses the team.
  ~Team();

  void bind(const TeamBind& given);
  void balance(const int32_t* quota, int64_t steal_threshold, double hang_s);
  void fill(const TeamFill* fills, int64_t count);
  void run(TeamRun* run);
  void inject_fault(int worker, int kind, double seconds);

  // Whether a thread did not end its chunk in time.
  bool hung() const { return hung_; }

  // Lets the threads end when they can.
  void detach();

 private:
  struct alignas(64) WorkerState {
    ChunkQueue queue;
    std::atomic<int64_t> chunk_began_ns{0};  // Of the chunk under way; 0: none is.
    WorkerTimes times{};
  };

  // What the threads do in one call: `fills`, or the steps of `run`.
  struct Job {
    TeamRun run;
    const TeamFill* fills;
    int64_t num_fills;
  };

  struct ThreadStart {
    Team* team;
    int worker;
    ThreadPlacement placement;
  };

  static void* serve(void* start);
  void start_thread(int worker, const WorkerPlacement& placement);
  void end_threads();
  void call(const Job& job, int64_t* steps_done);
  bool work(int me, int64_t* steps_done);
  void assign_chunks();
  bool take_chunk(int me, int64_t* chunk, bool* stolen);
  void run_chunks(int me, int64_t step);
  void run_chunk(int me, int64_t chunk, int64_t step);
  bool meets_fault(int me);
  void finish_chunks(int64_t step);
  bool update(int me, int64_t step);
  void fill_share(int me);
  void look_for_hangs();
  bool is_given_up() const { return meeting_.is_off(); }
  void give_up(const char* words);
  Worker place_of(int me) const { return {me, workers_}; }

  const int workers_;
  std::unique_ptr<WorkerState[]> states_;
  std::vector<pthread_t> threads_;

  int64_t chunks_ = 0;
  std::vector<ChunkProgram> programs_;  // For each worker; none where chunks run elsewhere.
  std::vector<TeamWeight> weights_;
  std::vector<TeamBuffer> buffers_;
  double loss_share_ = 0;
  int64_t* keys_ = nullptr;
  std::vector<int32_t> quota_;
  const float* chunk_losses_ = nullptr;
  std::vector<char> failed_;
  int64_t steal_threshold_ = 1, hang_ns_ = 0;

  Job job_{};
  Waitable start_;
  std::atomic<bool> closing_{false};
  Meeting meeting_;
  std::atomic<bool> gives_up_{false};
  std::string failure_;  // Why; written by the first one that gives up.
  bool hung_ = false;

  std::atomic<int> fault_worker_{-1}, fault_kind_{0};
  std::atomic<int64_t> fault_ns_{0};
};

}  // namespace hotloop
