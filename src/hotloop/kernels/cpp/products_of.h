// The calls of products.h for one format of panels; instantiated by products.cpp and gemm_bf16.cpp.
#pragma once

#include "epilogue.h"
#include "gemm.h"
#include "update_epilogue.h"

namespace hotloop {

// Results to memory at once, with no more than relu after them.
struct StoreEpilogue : MatrixEpilogue<kRelu> {
  static constexpr bool kDeferred = false;
  using ThreadMode = NoOverlap;
  using Deferred = NoOverlap;
};

template <class Format>
void product_of(const ProductCall& call) {
  const Epilogue terms{call.bias, nullptr, call.mask, call.activation};
  const StoreEpilogue epilogue{{terms, call.c, call.c_row_stride, call.mask_row_stride}};
  gemm<Format>({call.m, call.n, call.k, call.a, call.b, static_cast<int>(call.num_threads)},
               epilogue);
}

template <class Format>
void product_update_of(const ProductUpdateCall& call) {
  with_update_kind(call.rule.kind, [&](auto kind) {
    gemm<Format>({call.m, call.n, call.k, call.a, call.b, static_cast<int>(call.num_threads)},
                 UpdateEpilogue<kind>(call));
  });
}

void product_bfloat16(const ProductCall& call);
void product_update_bfloat16(const ProductUpdateCall& call);

}  // namespace hotloop
