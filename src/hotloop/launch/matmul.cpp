// Float32 matrix products of a running program by the faster of two libraries, exactly: MKL, as
// torch has it, or oneDNN. Registered over mm, addmm, bmm and baddbmm of the CPU dispatch key, below
// autograd; what it does not take goes to torch's own kernel by a direct call.
//
// The first products of a shape are made by each library in turn and timed; the faster is kept, and
// looked at again now and then.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/baddbmm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <limits>
#include <memory>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace at::native {
// result = beta * result + alpha * a @ b by oneDNN; 2 or 3 dimensions. Exported by libtorch_cpu.
TORCH_API void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta,
                             float alpha);
}  // namespace at::native

namespace {

using at::Scalar;
using at::Tensor;

// Products of fewer multiply-adds are left to torch.
int64_t least_work = 0;
constexpr int kRounds = 6;         // Timings of each library; the first, which sets up, is dropped.
constexpr double kMargin = 0.97;   // oneDNN must be faster by this much.
constexpr int kSlots = 1 << 14;    // A power of two.
constexpr int kProbes = 16;

enum Kernel : int { kUnknown = -1, kMkl = 0, kOneDnn = 1 };

struct Key {
  int64_t batch, m, k, n;  // batch 0: two dimensions.
  int32_t layout;          // 1: a is transposed, 2: b is, 4: adds to something.
  int32_t threads;
  bool operator==(const Key& o) const {
    return batch == o.batch && m == o.m && k == o.k && n == o.n && layout == o.layout &&
           threads == o.threads;
  }
};

struct Entry {
  Key key;
  std::atomic<int> choice{kUnknown};
  std::atomic_flag timing = ATOMIC_FLAG_INIT;
  int tries = 0;  // Guarded by `timing`, as `best_s` is.
  double best_s[2] = {std::numeric_limits<double>::infinity(),
                      std::numeric_limits<double>::infinity()};
  std::atomic<int64_t> calls{0}, ns{0};
};

// Entries are never removed and no lock is held: a process may fork at any moment.
std::atomic<Entry*> table[kSlots];

uint64_t hash(const Key& key) {
  uint64_t h = 0xcbf29ce484222325u;
  for (int64_t part : {key.batch, key.m, key.k, key.n, int64_t{key.layout}, int64_t{key.threads}}) {
    h = (h ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
  }
  return h;
}

// The entry of a key, made if need be; null where the table is full around it.
Entry* find(const Key& key) {
  uint64_t at = hash(key);
  std::unique_ptr<Entry> fresh;
  for (int probe = 0; probe < kProbes; ++probe, ++at) {
    std::atomic<Entry*>& slot = table[at & (kSlots - 1)];
    Entry* entry = slot.load(std::memory_order_acquire);
    if (!entry) {
      if (!fresh) {
        fresh.reset(new Entry);
        fresh->key = key;
      }
      if (slot.compare_exchange_strong(entry, fresh.get(), std::memory_order_acq_rel)) {
        return fresh.release();
      }
    }
    if (entry->key == key) return entry;
  }
  return nullptr;
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

// Whether the last two dimensions are a matrix as BLAS takes one; `transposed` says which way.
bool is_matrix(const Tensor& t, bool* transposed) {
  int64_t d = t.dim(), rows = t.size(d - 2), columns = t.size(d - 1);
  int64_t rs = t.stride(d - 2), cs = t.stride(d - 1);
  if (d == 3 && t.size(0) > 1 && t.stride(0) < 1) return false;  // Expanded.
  if (cs == 1 && rs >= std::max<int64_t>(1, columns)) {
    *transposed = false;
    return true;
  }
  *transposed = true;
  return rs == 1 && cs >= std::max<int64_t>(1, rows);
}

bool is_plain(const Tensor& t) {
  return t.scalar_type() == at::kFloat && t.layout() == at::kStrided && t.device().is_cpu();
}

// What the user may have asked of float32: then it is left to torch, which knows how.
bool is_exact_mode() {
  const auto& context = at::globalContext();
  auto precision =
      context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return context.userEnabledMkldnn() &&
         (precision == at::Float32Precision::NONE || precision == at::Float32Precision::IEEE);
}

// The entry of a product that may be routed, else null.
Entry* lookup(const Tensor& a, const Tensor& b, bool adds) {
  int64_t d = a.dim();
  if ((d != 2 && d != 3) || b.dim() != d || a.size(d - 1) != b.size(d - 2)) return nullptr;
  if (d == 3 && a.size(0) != b.size(0)) return nullptr;
  int64_t batch = d == 3 ? a.size(0) : 0, m = a.size(d - 2), k = a.size(d - 1), n = b.size(d - 1);
  double work = static_cast<double>(m) * static_cast<double>(k) * static_cast<double>(n) *
                static_cast<double>(d == 3 ? batch : 1);
  if (work == 0 || work < static_cast<double>(least_work)) return nullptr;
  bool a_turned, b_turned;
  if (!is_plain(a) || !is_plain(b) || !is_matrix(a, &a_turned) || !is_matrix(b, &b_turned) ||
      !is_exact_mode() || at::in_parallel_region()) {
    return nullptr;
  }
  int32_t layout = (a_turned ? 1 : 0) | (b_turned ? 2 : 0) | (adds ? 4 : 0);
  return find({batch, m, k, n, layout, at::get_num_threads()});
}

// Whether the choice is looked at again at this call: at calls 64, 256, 1024, ... two by the other
// library, then two by the chosen one. A neighbour may have spoiled the first timings.
bool is_second_look(int64_t call, bool* other) {
  int64_t at = call & ~INT64_C(3);
  bool power_of_four = at >= 64 && (at & (at - 1)) == 0 && (__builtin_ctzll(at) & 1) == 0;
  *other = (call & 2) == 0;
  return power_of_four;
}

// Make one product: `run` is given the kernel.
template <class Run>
void make(Entry* entry, const Run& run) {
  int64_t call = entry->calls.fetch_add(1, std::memory_order_relaxed);
  int chosen = entry->choice.load(std::memory_order_relaxed);
  int kernel = chosen == kUnknown ? kMkl : chosen;
  bool other = false;
  bool timing = chosen == kUnknown || is_second_look(call, &other);
  // Who asks for the same bits each time does not want a choice made by the clock.
  timing = timing && !at::globalContext().deterministicAlgorithms() &&
           !entry->timing.test_and_set();
  if (timing) kernel = chosen == kUnknown ? entry->tries % 2 : (other ? 1 - chosen : chosen);
  int64_t started = now_ns();
  run(kernel);
  int64_t ns = now_ns() - started;
  entry->ns.fetch_add(ns, std::memory_order_relaxed);
  if (!timing) return;
  // A neighbour only ever slows a product down: the least time is what the library takes.
  ++entry->tries;
  if (chosen != kUnknown || entry->tries > 2) {
    entry->best_s[kernel] = std::min(entry->best_s[kernel], static_cast<double>(ns) * 1e-9);
  }
  if (entry->tries >= 2 * kRounds && (chosen == kUnknown || (call & 3) == 3)) {
    bool faster = entry->best_s[kOneDnn] < kMargin * entry->best_s[kMkl];
    entry->choice.store(faster ? kOneDnn : kMkl, std::memory_order_relaxed);
  }
  entry->timing.clear();
}

Tensor empty_result(const Tensor& a, const Tensor& b) {
  return a.dim() == 3 ? at::empty({a.size(0), a.size(1), b.size(2)}, a.options())
                      : at::empty({a.size(0), b.size(1)}, a.options());
}

// Whether the result may be written straight to `out`.
bool is_target(const Tensor& out, const Tensor& a, const Tensor& b) {
  int64_t d = a.dim();
  if (d < 2 || b.dim() != d || out.dim() != d || !is_plain(out) || !out.is_contiguous()) return false;
  return out.size(d - 2) == a.size(d - 2) && out.size(d - 1) == b.size(d - 1) &&
         (d == 2 || out.size(0) == a.size(0)) && !out.is_alias_of(a) && !out.is_alias_of(b);
}

// self (a vector, a row, a matrix ...) can be added to the product without a change of its shape.
bool can_add(const Tensor& self, const Tensor& a, const Tensor& b) {
  int64_t d = a.dim();
  if (!is_plain(self) || self.dim() > d) return false;
  for (int64_t i = 1; i <= self.dim(); ++i) {
    int64_t wanted = i == 1 ? b.size(d - 1) : i == 2 ? a.size(d - 2) : a.size(0);
    if (self.size(self.dim() - i) != wanted && self.size(self.dim() - i) != 1) return false;
  }
  return true;
}

bool is_real(const Scalar& s) { return s.isFloatingPoint() || s.isIntegral(true); }

// The entry of beta * self + alpha * a @ b, where that may be routed.
Entry* lookup_added(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta,
                    const Scalar& alpha) {
  Entry* entry = lookup(a, b, true);
  bool fits = entry && is_real(beta) && is_real(alpha) && alpha.toDouble() != 0;
  return fits && can_add(self, a, b) ? entry : nullptr;
}

void add_by_onednn(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta,
                   const Scalar& alpha, const Tensor& out) {
  float scale = beta.toFloat();
  if (scale != 0 && !out.is_same(self)) out.copy_(self.expand(out.sizes()));
  at::native::mkldnn_matmul(a, b, out, scale, alpha.toFloat());
}

Tensor product(const Tensor& a, const Tensor& b, Tensor (*by_torch)(const Tensor&, const Tensor&)) {
  Entry* entry = lookup(a, b, false);
  if (!entry) return by_torch(a, b);
  Tensor result;
  make(entry, [&](int kernel) {
    if (kernel == kMkl) {
      result = by_torch(a, b);
    } else {
      result = empty_result(a, b);
      at::native::mkldnn_matmul(a, b, result, 0.0f, 1.0f);
    }
  });
  return result;
}

Tensor& product_out(const Tensor& a, const Tensor& b, Tensor& out,
                    Tensor& (*by_torch)(Tensor&, const Tensor&, const Tensor&)) {
  Entry* entry = is_target(out, a, b) ? lookup(a, b, false) : nullptr;
  if (!entry) return by_torch(out, a, b);
  make(entry, [&](int kernel) {
    if (kernel == kMkl) {
      by_torch(out, a, b);
    } else {
      at::native::mkldnn_matmul(a, b, out, 0.0f, 1.0f);
    }
  });
  return out;
}

using AddOut = Tensor& (*)(Tensor&, const Tensor&, const Tensor&, const Tensor&, const Scalar&,
                           const Scalar&);
using Add = Tensor (*)(const Tensor&, const Tensor&, const Tensor&, const Scalar&, const Scalar&);

Tensor added(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta,
             const Scalar& alpha, Add by_torch) {
  Entry* entry = lookup_added(self, a, b, beta, alpha);
  if (!entry) return by_torch(self, a, b, beta, alpha);
  Tensor result;
  make(entry, [&](int kernel) {
    if (kernel == kMkl) {
      result = by_torch(self, a, b, beta, alpha);
    } else {
      result = empty_result(a, b);
      add_by_onednn(self, a, b, beta, alpha, result);
    }
  });
  return result;
}

Tensor& added_out(const Tensor& self, const Tensor& a, const Tensor& b, const Scalar& beta,
                  const Scalar& alpha, Tensor& out, AddOut by_torch) {
  bool apart = out.is_same(self) || !out.is_alias_of(self);
  Entry* entry = apart && is_target(out, a, b) ? lookup_added(self, a, b, beta, alpha) : nullptr;
  if (!entry) return by_torch(out, self, a, b, beta, alpha);
  make(entry, [&](int kernel) {
    if (kernel == kMkl) {
      by_torch(out, self, a, b, beta, alpha);
    } else {
      add_by_onednn(self, a, b, beta, alpha, out);
    }
  });
  return out;
}

#define C_T const Tensor&
#define C_S const Scalar&

Tensor mm(C_T a, C_T b) { return product(a, b, at::cpu::mm); }
Tensor& mm_out(C_T a, C_T b, Tensor& out) { return product_out(a, b, out, at::cpu::mm_out); }
Tensor bmm(C_T a, C_T b) { return product(a, b, at::cpu::bmm); }
Tensor& bmm_out(C_T a, C_T b, Tensor& out) { return product_out(a, b, out, at::cpu::bmm_out); }
Tensor addmm(C_T self, C_T a, C_T b, C_S beta, C_S alpha) {
  return added(self, a, b, beta, alpha, at::cpu::addmm);
}
Tensor& addmm_out(C_T self, C_T a, C_T b, C_S beta, C_S alpha, Tensor& out) {
  return added_out(self, a, b, beta, alpha, out, at::cpu::addmm_out);
}
Tensor& addmm_(Tensor& self, C_T a, C_T b, C_S beta, C_S alpha) {
  return added_out(self, a, b, beta, alpha, self,
                   [](Tensor& out, C_T, C_T a, C_T b, C_S beta, C_S alpha) -> Tensor& {
                     return at::cpu::addmm_(out, a, b, beta, alpha);
                   });
}
Tensor baddbmm(C_T self, C_T a, C_T b, C_S beta, C_S alpha) {
  return added(self, a, b, beta, alpha, at::cpu::baddbmm);
}
Tensor& baddbmm_out(C_T self, C_T a, C_T b, C_S beta, C_S alpha, Tensor& out) {
  return added_out(self, a, b, beta, alpha, out, at::cpu::baddbmm_out);
}
Tensor& baddbmm_(Tensor& self, C_T a, C_T b, C_S beta, C_S alpha) {
  return added_out(self, a, b, beta, alpha, self,
                   [](Tensor& out, C_T, C_T a, C_T b, C_S beta, C_S alpha) -> Tensor& {
                     return at::cpu::baddbmm_(out, a, b, beta, alpha);
                   });
}

// torch warns that a kernel is replaced, which is the purpose.
struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

torch::Library* library = nullptr;

}  // namespace

// Products of at least `work` multiply-adds are routed. Returns 0, or 1 where it is registered already.
EXPORT int hotloop_matmul_install(int64_t work) {
  if (library) return 1;
  least_work = work;
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__,
                               __LINE__);
  library->impl("mm", mm);
  library->impl("mm.out", mm_out);
  library->impl("bmm", bmm);
  library->impl("bmm.out", bmm_out);
  library->impl("addmm", addmm);
  library->impl("addmm.out", addmm_out);
  library->impl("addmm_", addmm_);
  library->impl("baddbmm", baddbmm);
  library->impl("baddbmm.out", baddbmm_out);
  library->impl("baddbmm_", baddbmm_);
  return 0;
}

EXPORT void hotloop_matmul_remove() {
  delete library;
  library = nullptr;
}

// The choice for a product, made before: kernel 0 MKL, 1 oneDNN; the least seconds of each.
EXPORT void hotloop_matmul_know(int64_t batch, int64_t m, int64_t k, int64_t n, int32_t layout,
                                int32_t threads, int32_t kernel, double mkl_s, double onednn_s) {
  Entry* entry = find({batch, m, k, n, layout, threads});
  if (!entry) return;
  entry->best_s[kMkl] = mkl_s;
  entry->best_s[kOneDnn] = onednn_s;
  entry->tries = 2 * kRounds;
  entry->choice.store(kernel, std::memory_order_relaxed);
}

struct hotloop_matmul_row {
  int64_t batch, m, k, n;
  int32_t layout, threads, choice, reserved;
  int64_t calls, ns;
  double mkl_s, onednn_s;
};

// Writes up to `count` rows; returns how many there are.
EXPORT int64_t hotloop_matmul_rows(hotloop_matmul_row* rows, int64_t count) {
  int64_t found = 0;
  for (const std::atomic<Entry*>& slot : table) {
    const Entry* e = slot.load(std::memory_order_acquire);
    if (!e) continue;
    if (found < count) {
      rows[found] = {e->key.batch,  e->key.m,       e->key.k,        e->key.n,
                     e->key.layout, e->key.threads, e->choice.load(), 0,
                     e->calls.load(), e->ns.load(), e->best_s[kMkl],  e->best_s[kOneDnn]};
    }
    ++found;
  }
  return found;
}
