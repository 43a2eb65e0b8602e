#include "product_choices.h"

#include <ctime>

#include <algorithm>
#include <memory>

#include "error.h"

namespace hotloop {
namespace {

constexpr int kRounds = 6;       // Timings of each kernel; the first, which sets up, is dropped.
constexpr double kMargin = 0.97; // A kernel must be faster than torch's by this much.
constexpr int kSlots = 1 << 14;  // A power of two.
constexpr int kProbes = 16;
constexpr int64_t kLook = 8;     // Calls of a second look; at least 2 for each kernel.

std::atomic<ProductChoice*> table[kSlots];
std::atomic<int64_t> least_work{0};
std::atomic<bool> exact{true}, timed{true};

uint64_t hash_of(const ProductShape& shape) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t part : {shape.batch, shape.m, shape.k, shape.n, int64_t{shape.layout},
                       int64_t{shape.threads}}) {
    hash = (hash ^ static_cast<uint64_t>(part)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

void forget_times(ProductChoice& choice) {
  std::fill_n(choice.best_s, kProductKernels, std::numeric_limits<double>::infinity());
  choice.tries = 0;
}

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Whether call number `call` belongs to a second look, which begins at calls 64, 256, 1024, ...
bool is_second_look(int64_t call) {
  const int64_t first = call & ~(kLook - 1);
  return first >= 64 && (first & (first - 1)) == 0 && (__builtin_ctzll(first) & 1) == 0;
}

}  // namespace

int64_t least_product_work() { return least_work.load(std::memory_order_relaxed); }
bool are_products_exact() { return exact.load(std::memory_order_relaxed); }

ProductChoice* find_product_choice(const ProductShape& shape) {
  uint64_t at = hash_of(shape);
  std::unique_ptr<ProductChoice> fresh;
  for (int probe = 0; probe < kProbes; ++probe, ++at) {
    std::atomic<ProductChoice*>& slot = table[at & (kSlots - 1)];
    ProductChoice* found = slot.load(std::memory_order_acquire);
    if (!found) {
      if (!fresh) {
        fresh = std::make_unique<ProductChoice>();
        fresh->shape = shape;
        forget_times(*fresh);
      }
      if (slot.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel))
        return fresh.release();
    }
    if (found->shape == shape) return found;
  }
  return nullptr;
}

ProductTurn::ProductTurn(ProductChoice& choice, unsigned candidates)
    : choice_(choice), candidates_(candidates), count_(__builtin_popcount(candidates)) {
  const int64_t call = choice.calls.fetch_add(1, std::memory_order_relaxed);
  const int known = choice.kernel.load(std::memory_order_relaxed);
  knew_ = known != kUnknownKernel;
  if (knew_ && candidates >> known & 1) kernel_ = known;
  const int64_t in_look = call & (kLook - 1);
  const bool looks = is_second_look(call) && in_look < 2 * count_;
  if (timed.load(std::memory_order_relaxed) && (!knew_ || looks) && !choice.is_timing.test_and_set()) {
    times_ = true;
    kernel_ = nth_candidate(knew_ ? static_cast<int>(in_look / 2) : choice.tries % count_);
    decides_ = knew_ ? in_look == 2 * count_ - 1 : choice.tries + 1 >= count_ * kRounds;
  }
  started_ns_ = now_ns();
}

ProductTurn::~ProductTurn() {
  const int64_t ns = now_ns() - started_ns_;
  choice_.ns.fetch_add(ns, std::memory_order_relaxed);
  if (!times_) return;
  learn(ns);
  choice_.is_timing.clear();
}

// The candidate that is `number`-th among the bits of `candidates_`.
int ProductTurn::nth_candidate(int number) const {
  unsigned left = candidates_;
  for (; number > 0; --number) left &= left - 1;
  return __builtin_ctz(left);
}

void ProductTurn::learn(int64_t ns) {
  ++choice_.tries;
  // A neighbour only ever slows a product down: the least time is what the kernel takes.
  const bool sets_up = !knew_ && choice_.tries <= count_;
  double* best_s = choice_.best_s;
  if (!sets_up && !gave_up_) best_s[kernel_] = std::min(best_s[kernel_], ns * 1e-9);
  if (!decides_) return;
  int winner = kTorch;
  double least_s = kMargin * best_s[kTorch];
  for (int kernel = kTorch + 1; kernel < kProductKernels; ++kernel) {
    if (!(candidates_ >> kernel & 1) || best_s[kernel] >= least_s) continue;
    winner = kernel;
    least_s = best_s[kernel];
  }
  choice_.kernel.store(winner, std::memory_order_relaxed);
}

}  // namespace hotloop

using namespace hotloop;

HOTLOOP_EXPORT void hotloop_router_set_mode(const RouterMode* mode) {
  least_work = mode->least_work;
  exact = mode->exact != 0;
  timed = mode->timed != 0;
}

HOTLOOP_EXPORT void hotloop_router_know(const RouterRow* row) {
  ProductChoice* choice = find_product_choice(
      {row->batch, row->m, row->k, row->n, row->layout, row->threads});
  if (!choice) return;
  std::copy_n(row->best_s, kProductKernels, choice->best_s);
  choice->kernel.store(row->kernel, std::memory_order_relaxed);
}

HOTLOOP_EXPORT void hotloop_router_clear() {
  for (std::atomic<ProductChoice*>& slot : table) {
    ProductChoice* choice = slot.load(std::memory_order_acquire);
    if (!choice) continue;
    choice->kernel.store(kUnknownKernel, std::memory_order_relaxed);
    choice->calls.store(0);
    choice->ns.store(0);
    forget_times(*choice);
  }
}

HOTLOOP_EXPORT int64_t hotloop_router_rows(RouterRow* rows, int64_t count) {
  int64_t found = 0;
  for (const std::atomic<ProductChoice*>& slot : table) {
    const ProductChoice* choice = slot.load(std::memory_order_acquire);
    if (!choice) continue;
    if (found < count) {
      const ProductShape& shape = choice->shape;
      RouterRow& row = rows[found];
      row = {shape.batch,  shape.m,  shape.k, shape.n, shape.layout, shape.threads,
             choice->kernel, 0, choice->calls, choice->ns, {}};
      std::copy_n(choice->best_s, kProductKernels, row.best_s);
    }
    ++found;
  }
  return found;
}
