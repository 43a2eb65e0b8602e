#include "error.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "abi.h"

namespace hotloop {
namespace {

thread_local char last_error[512] = "";

// What the system says it could still give, and what the limit on addresses leaves; the smaller one.
int64_t available_bytes() {
  long long available = -1;
  if (FILE* file = std::fopen("/proc/meminfo", "re")) {
    char line[128];
    long long kib = 0;
    while (std::fgets(line, sizeof line, file))
      if (std::sscanf(line, "MemAvailable: %lld", &kib) == 1) available = kib * 1024;
    std::fclose(file);
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    long long pages = 0;
    if (FILE* file = std::fopen("/proc/self/statm", "re")) {
      if (std::fscanf(file, "%lld", &pages) != 1) pages = 0;
      std::fclose(file);
    }
    const long long left =
        std::max(0LL, static_cast<long long>(limit.rlim_cur) - pages * 4096);
    available = available < 0 ? left : std::min(available, left);
  }
  return available;
}

}  // namespace

void set_error(const char* words) noexcept {
  std::strncpy(last_error, words, sizeof last_error - 1);
}

void throw_out_of_memory(int64_t wanted_bytes) {
  char words[160];
  std::snprintf(words, sizeof words,
                "a kernel's working memory must be available (got: %lld bytes wanted, %lld available)",
                static_cast<long long>(wanted_bytes), static_cast<long long>(available_bytes()));
  throw Error(words);
}

}  // namespace hotloop

HOTLOOP_EXPORT const char* hotloop_error() { return hotloop::last_error; }

HOTLOOP_EXPORT void hotloop_set_error(const char* words) { hotloop::set_error(words); }

HOTLOOP_EXPORT const char* hotloop_binding_hash() { return HOTLOOP_BINDING_HASH; }

HOTLOOP_EXPORT const char* hotloop_build_hash() { return HOTLOOP_SOURCES_HASH; }

HOTLOOP_EXPORT int64_t hotloop_check_layout(const int64_t* rows, int64_t count) {
  using namespace hotloop;
  static constexpr int64_t layout[] = {HOTLOOP_LAYOUT};
  constexpr int64_t known = sizeof layout / sizeof *layout;
  for (int64_t i = 0; i < std::min(count, known); ++i)
    if (rows[i] != layout[i]) return i;
  return count == known ? -1 : std::min(count, known);
}
