// Failures inside the library: thrown as Error, turned into a status at its border.
#pragma once

#include <cstdint>
#include <exception>
#include <string>

namespace hotloop {

class Error : public std::exception {
 public:
  explicit Error(std::string words) : words_(std::move(words)) {}
  const char* what() const noexcept override { return words_.c_str(); }

 private:
  std::string words_;
};

// An allocation that the system refused: says how many bytes were wanted and how many there are.
[[noreturn]] void throw_out_of_memory(int64_t wanted_bytes);

// Kept for the calling thread, until its next error.
void set_error(const char* words) noexcept;

// Runs `body`; 0, or 1 where it threw, with the words kept for hotloop_error.
template <class Body>
int32_t guarded(const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    set_error("memory must be available to hotloop's kernels");
  } catch (const std::exception& error) {
    set_error(error.what());
  }
  return 1;
}

}  // namespace hotloop

#define HOTLOOP_EXPORT extern "C" __attribute__((visibility("default")))
