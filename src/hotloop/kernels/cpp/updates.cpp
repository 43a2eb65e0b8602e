#include "updates.h"

#include "error.h"
#include "parallel.h"
#include "update_rule.h"

namespace hotloop {
namespace {

// Fewer weights than so many are updated by one thread: waking a second one costs more.
constexpr int64_t kOneThreadCount = 32768;

}  // namespace

void update(const UpdateCall& call) {
  const int threads = call.count < kOneThreadCount ? 1 : static_cast<int>(call.num_threads);
  with_update_kind(call.rule.kind, [&](auto kind) {
    parallel(threads, [&](Worker worker) {
      const Range mine = share(call.count, kLineFloats, worker);
      const int64_t at = mine.begin;
      [[maybe_unused]] const FlushDenormals mode;
      update_run<kind>(mine.end - at, call.weight + at, call.gradient + at,
                       call.state1 + (has_state1(kind) ? at : 0),
                       call.state2 + (has_state2(kind) ? at : 0),
                       UpdateScalars(call.rule, call.scale));
    });
  });
}

}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_update(const hotloop::UpdateCall* call) {
  return hotloop::guarded([&] { hotloop::update(*call); });
}
