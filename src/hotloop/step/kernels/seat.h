// Where a worker's thread runs, and where its new pages come from. Part of team.cpp.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

// A worker's place: the CPUs it may run on, none for any; the mode of its memory policy, -1 for the one
// it has, and the nodes of that.
struct Seat {
  std::vector<int> cpus, nodes;
  int mode = -1;
};

// Reads the number of CPUs, these, the mode, the number of nodes, these; and moves on.
Seat next_seat(const int32_t** at) {
  Seat seat;
  auto read = [at] { return *(*at)++; };
  seat.cpus.resize(read());
  for (int& cpu : seat.cpus) cpu = read();
  seat.mode = read();
  seat.nodes.resize(read());
  for (int& node : seat.nodes) node = read();
  return seat;
}

// Wishes: what the kernel refuses is left as it is. The caller has tried the same on its own thread.
void sit(const Seat& seat, int me) {
  char name[16];
  std::snprintf(name, sizeof name, "hotloop-w%d", me);
  pthread_setname_np(pthread_self(), name);
  if (!seat.cpus.empty()) {
    const int most = 1 + *std::max_element(seat.cpus.begin(), seat.cpus.end());
    cpu_set_t* set = CPU_ALLOC(most);
    const size_t bytes = CPU_ALLOC_SIZE(most);
    CPU_ZERO_S(bytes, set);
    for (int cpu : seat.cpus) CPU_SET_S(cpu, bytes, set);
    pthread_setaffinity_np(pthread_self(), bytes, set);
    CPU_FREE(set);
  }
#ifdef SYS_set_mempolicy
  if (seat.mode >= 0) {
    unsigned long mask[1024 / (8 * sizeof(unsigned long))] = {};
    for (int node : seat.nodes)
      if (node >= 0 && node < 1024)
        mask[node / (8 * sizeof *mask)] |= 1UL << (node % (8 * sizeof *mask));
    syscall(SYS_set_mempolicy, seat.mode, seat.nodes.empty() ? nullptr : mask,
            seat.nodes.empty() ? 0L : 1025L);
  }
#endif
}

}  // namespace
