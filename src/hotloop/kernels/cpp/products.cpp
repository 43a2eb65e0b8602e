#include "products.h"

#include "error.h"
#include "products_of.h"

namespace hotloop {

void product(const ProductCall& call) {
  if (call.bfloat16) product_bfloat16(call);
  else product_of<Float32>(call);
}

void product_update(const ProductUpdateCall& call) {
  if (call.bfloat16) product_update_bfloat16(call);
  else product_update_of<Float32>(call);
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_product(const hotloop::ProductCall* call) {
  return hotloop::guarded([&] { hotloop::product(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_product_update(const hotloop::ProductUpdateCall* call) {
  return hotloop::guarded([&] { hotloop::product_update(*call); });
}

HOTLOOP_EXPORT int32_t hotloop_has_bfloat16() { return hotloop::has_bfloat16_products(); }
