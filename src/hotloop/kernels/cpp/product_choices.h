// Which kernel makes a matrix product of a shape: they take turns in the first calls, the fastest is kept, and
// all are looked at again now and then, because a neighbour may have spoiled the first timings.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "abi.h"

namespace hotloop {

enum ProductKernel : int { kUnknownKernel = -1, kTorch = 0, kOneDnn = 1, kHotloop = 2 };
constexpr int kProductKernels = 3;

enum ProductLayout : int32_t { kTransposedA = 1, kTransposedB = 2, kAddsBias = 4, kIntoOut = 8 };

struct ProductShape {
  int64_t batch, m, k, n;  // batch 0: one product.
  int32_t layout, threads;

  bool operator==(const ProductShape& other) const {
    return batch == other.batch && m == other.m && k == other.k && n == other.n &&
           layout == other.layout && threads == other.threads;
  }
};

struct ProductChoice {
  ProductShape shape;
  std::atomic<int> kernel{kUnknownKernel};
  std::atomic_flag is_timing = ATOMIC_FLAG_INIT;
  int tries = 0;  // Guarded by `is_timing`, as `best_s` is.
  double best_s[kProductKernels];
  std::atomic<int64_t> calls{0}, ns{0};
};

// The choice of a shape, made if need be; null where the table is full around it. Takes no lock and never
// frees: a process may fork at any moment.
ProductChoice* find_product_choice(const ProductShape& shape);

// Multiply-adds of the smallest product that is routed.
int64_t least_product_work();
// Whether products are those of float32; else they are left to torch.
bool are_products_exact();

// One call of a product: which kernel makes it, and what its time tells.
class ProductTurn {
 public:
  // `candidates`: bit i: kernel i can make this product. torch can always.
  ProductTurn(ProductChoice& choice, unsigned candidates);
  ~ProductTurn();
  ProductTurn(const ProductTurn&) = delete;

  int kernel() const { return kernel_; }

  // The kernel could not make it, or failed: nothing is learnt.
  void give_up() { gave_up_ = true; }

 private:
  int nth_candidate(int number) const;
  void learn(int64_t ns);

  ProductChoice& choice_;
  const unsigned candidates_;
  int count_, kernel_ = kTorch;
  bool times_ = false, knew_ = false, decides_ = false, gave_up_ = false;
  int64_t started_ns_;
};

}  // namespace hotloop
