// Where a worker's thread runs, and where its new pages come from.
#pragma once

#include <sched.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "abi.h"

namespace hotloop {

// A copy of WorkerPlacement.
struct ThreadPlacement {
  std::vector<int32_t> cpus, nodes;
  int64_t policy_mode;

  explicit ThreadPlacement(const WorkerPlacement& given)
      : cpus(given.cpus, given.cpus + given.num_cpus),
        nodes(given.nodes, given.nodes + given.num_nodes),
        policy_mode(given.policy_mode) {}
};

// Names the calling thread and moves it there. Wishes: what the kernel refuses is left as it is; the caller of the
// team has tried the same on its own thread.
inline void place_this_thread(const ThreadPlacement& placement, int worker) {
  char name[16];
  std::snprintf(name, sizeof name, "hotloop-w%d", worker);
  prctl(PR_SET_NAME, name);
  if (!placement.cpus.empty()) {
    const int most = 1 + *std::max_element(placement.cpus.begin(), placement.cpus.end());
    if (cpu_set_t* set = CPU_ALLOC(most)) {
      const size_t bytes = CPU_ALLOC_SIZE(most);
      CPU_ZERO_S(bytes, set);
      for (const int32_t cpu : placement.cpus) CPU_SET_S(cpu, bytes, set);
      sched_setaffinity(0, bytes, set);
      CPU_FREE(set);
    }
  }
#ifdef SYS_set_mempolicy
  if (placement.policy_mode >= 0) {
    constexpr int kNodes = 1024, kBits = 8 * sizeof(unsigned long);
    unsigned long mask[kNodes / kBits] = {};
    for (const int32_t node : placement.nodes)
      if (node >= 0 && node < kNodes) mask[node / kBits] |= 1UL << (node % kBits);
    const bool none = placement.nodes.empty();
    syscall(SYS_set_mempolicy, static_cast<long>(placement.policy_mode), none ? nullptr : mask,
            none ? 0L : kNodes + 1L);
  }
#endif
}

}  // namespace hotloop
