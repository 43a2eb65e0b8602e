// What the check programs share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);      \
      std::exit(1);                                                                     \
    }                                                                                   \
  } while (false)

// The same numbers in each run: a failure can be repeated.
struct Draw {
  std::mt19937_64 engine;
  explicit Draw(unsigned seed) : engine(seed) {}

  size_t below(size_t end) { return engine() % end; }
};
