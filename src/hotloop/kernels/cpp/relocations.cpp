#include "relocations.h"

#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "error.h"

namespace hotloop {
namespace {

#if defined(__x86_64__)
constexpr uint32_t kCallSlot = R_X86_64_JUMP_SLOT, kAddressSlot = R_X86_64_GLOB_DAT;
#elif defined(__aarch64__)
constexpr uint32_t kCallSlot = R_AARCH64_JUMP_SLOT, kAddressSlot = R_AARCH64_GLOB_DAT;
#else
#error "the relocation types of this processor are not known here"
#endif

const char* file_name_of(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

struct Found {
  const char* file_name;
  dl_phdr_info info;
  bool done;
};

int look_at(dl_phdr_info* info, size_t, void* given) {
  auto* found = static_cast<Found*>(given);
  if (!info->dlpi_name || std::strcmp(file_name_of(info->dlpi_name), found->file_name) != 0) return 0;
  found->info = *info;
  return found->done = true;
}

uintptr_t page_of(uintptr_t address) {
  return address & ~(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) - 1);
}

}  // namespace

LoadedLibrary::LoadedLibrary(const char* file_name) : name_(file_name) {
  Found found{file_name, {}, false};
  dl_iterate_phdr(&look_at, &found);
  if (!found.done) throw Error("a library must be loaded (got: no " + name_ + ")");
  base_ = found.info.dlpi_addr;
  loaded_ = {UINTPTR_MAX, 0};
  const void* dynamic = nullptr;
  for (int i = 0; i < found.info.dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = found.info.dlpi_phdr[i];
    const uintptr_t begin = base_ + part.p_vaddr, end = begin + part.p_memsz;
    if (part.p_type == PT_LOAD)
      loaded_ = {std::min(loaded_.begin, begin), std::max(loaded_.end, end)};
    // As the loader does: whole pages, none that is partly outside at the end.
    if (part.p_type == PT_GNU_RELRO) relro_ = {page_of(begin), page_of(end)};
    if (part.p_type == PT_DYNAMIC) dynamic = reinterpret_cast<const void*>(begin);
  }
  if (dynamic) read_dynamic_section(dynamic);
  if (!symbols_ || !strings_)
    throw Error("a library must have a dynamic section (got: none in " + name_ + ")");
}

void LoadedLibrary::read_dynamic_section(const void* section) {
  // glibc's loader writes addresses into the section it has read; others leave offsets there.
  const auto address = [&](ElfW(Addr) value) {
    return reinterpret_cast<const void*>(value < base_ ? value + base_ : value);
  };
  for (auto* entry = static_cast<const ElfW(Dyn)*>(section); entry->d_tag != DT_NULL; ++entry) {
    const auto& value = entry->d_un;
    if (entry->d_tag == DT_SYMTAB) symbols_ = address(value.d_ptr);
    if (entry->d_tag == DT_STRTAB) strings_ = static_cast<const char*>(address(value.d_ptr));
    // Both have entries with addends (RELA) on the processors above.
    if (entry->d_tag == DT_JMPREL) tables_[0].entries = address(value.d_ptr);
    if (entry->d_tag == DT_PLTRELSZ) tables_[0].bytes = value.d_val;
    if (entry->d_tag == DT_RELA) tables_[1].entries = address(value.d_ptr);
    if (entry->d_tag == DT_RELASZ) tables_[1].bytes = value.d_val;
  }
}

std::vector<Slot> LoadedLibrary::slots_of(const char* symbol) const {
  std::vector<Slot> slots;
  for (const Table& table : tables_) {
    if (!table.entries) continue;
    const auto* entries = static_cast<const ElfW(Rela)*>(table.entries);
    for (size_t i = 0; i < table.bytes / sizeof *entries; ++i) {
      const uint32_t type = ELF64_R_TYPE(entries[i].r_info);
      if (type != kCallSlot && type != kAddressSlot) continue;
      const auto& named = static_cast<const ElfW(Sym)*>(symbols_)[ELF64_R_SYM(entries[i].r_info)];
      if (std::strcmp(strings_ + named.st_name, symbol) != 0) continue;
      const uintptr_t at = base_ + entries[i].r_offset;
      slots.push_back(
          {reinterpret_cast<void**>(at), at >= relro_.begin && at < relro_.end});
    }
  }
  return slots;
}

bool LoadedLibrary::holds(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  return at >= loaded_.begin && at < loaded_.end;
}

void* replace(const Slot& slot, void* function) {
  void* const page = reinterpret_cast<void*>(page_of(reinterpret_cast<uintptr_t>(slot.address)));
  const size_t size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (slot.is_read_only && mprotect(page, size, PROT_READ | PROT_WRITE) != 0)
    throw Error(std::string("a library's table of addresses must be writable (got: ") +
                std::strerror(errno) + ")");
  // Other threads call through it meanwhile.
  void* const before = __atomic_exchange_n(slot.address, function, __ATOMIC_ACQ_REL);
  if (slot.is_read_only) mprotect(page, size, PROT_READ);
  return before;
}

}  // namespace hotloop
