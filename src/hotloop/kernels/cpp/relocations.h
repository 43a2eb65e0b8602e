// The slots through which one loaded library calls functions of others, found and replaced.
//
// A shared library calls a function of another one through a table of addresses (the global offset table),
// which the loader fills in: System V ABI, "Dynamic Linking"; the relocation types are those of the
// processor supplements for x86-64 and AArch64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hotloop {

struct Slot {
  void** address;
  // The loader took the right to write to its page away once it had filled it in (RELRO).
  bool is_read_only;
};

// A library that this process has loaded.
class LoadedLibrary {
 public:
  // By the name of its file, such as "libc10.so". Throws Error: none of that name is loaded.
  explicit LoadedLibrary(const char* file_name);

  // Every slot that stands for `symbol`; none: the library does not refer to it.
  std::vector<Slot> slots_of(const char* symbol) const;

  // Whether an address is in this library: a slot that holds one is not filled in before its first call.
  bool holds(const void* address) const;

 private:
  struct Table {
    const void* entries;
    size_t bytes;
  };
  struct Span {
    uintptr_t begin = 0, end = 0;
  };

  void read_dynamic_section(const void* section);

  std::string name_;
  uintptr_t base_ = 0;
  Span loaded_, relro_;
  const void* symbols_ = nullptr;
  const char* strings_ = nullptr;
  Table tables_[2] = {};
};

// Lets a slot stand for another function; what it stood for. Throws Error where the system refuses.
void* replace(const Slot& slot, void* function);

}  // namespace hotloop
