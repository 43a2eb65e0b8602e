// The team of threads under a sanitizer: torch and the compiled step are fakes, all numbers are small whole
// numbers, and what comes out is compared with a plain loop, exactly.
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "abi.h"
#include "check.h"

using namespace hotloop;

namespace {

// ---- A fake of torch ------------------------------------------------------------------------------

struct FakeTensor {
  void* data;
  std::vector<int64_t> sizes;
  bool is_owner;

  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    return n;
  }
};

std::atomic<int64_t> tensors_alive{0};

void* make_tensor(void* data, std::vector<int64_t> sizes, bool is_owner) {
  ++tensors_alive;
  return new FakeTensor{data, std::move(sizes), is_owner};
}

int32_t fake_data(void* tensor, void** data) {
  *data = static_cast<FakeTensor*>(tensor)->data;
  return 0;
}

int32_t fake_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t*, int64_t, int32_t,
                       int32_t, int32_t, void** made) {
  if (dims < 0) return 1;
  *made = make_tensor(data, {sizes, sizes + dims}, false);
  return 0;
}

int32_t fake_another(void* tensor, void** made) {
  const auto* t = static_cast<FakeTensor*>(tensor);
  *made = make_tensor(t->data, t->sizes, false);
  return 0;
}

int32_t fake_delete(void* tensor) {
  auto* t = static_cast<FakeTensor*>(tensor);
  if (t->is_owner) delete static_cast<float*>(t->data);
  delete t;
  --tensors_alive;
  return 0;
}

int32_t fake_num_threads(uint32_t* threads) {
  *threads = 1;
  return 0;
}

int fake_mkl(int) { return 0; }

template <class Function>
void* entry(Function* function) {
  return reinterpret_cast<void*>(function);
}

void use_fakes() {
  TorchInterface torch{};
  torch.aoti_torch_get_data_ptr = entry(&fake_data);
  torch.aoti_torch_create_tensor_from_blob = entry(&fake_from_blob);
  torch.aoti_torch_new_tensor_handle = entry(&fake_another);
  torch.aoti_torch_delete_tensor_object = entry(&fake_delete);
  torch.torch_get_num_threads = entry(&fake_num_threads);
  torch.MKL_Set_Num_Threads_Local = entry(&fake_mkl);
  hotloop_use_torch(&torch);
}

// ---- A fake of a compiled chunk -------------------------------------------------------------------

// Inputs: weight [kCount], factored weight [kRows, kCols], a float buffer [1], a whole-number buffer [1], the
// gradient of the weight [kCount], two factors [kDepth, kRows] and [kDepth, kCols], a key [1], x, y.
constexpr int64_t kCount = 37, kRows = 19, kCols = 5, kDepth = 2, kSamples = 3;
enum Input { kWeight, kFactored, kFloatBuffer, kWholeBuffer, kGradient, kLeft, kRight, kKey, kX, kY, kInputs };

struct FakeContainer {
  std::atomic<bool> is_busy{false};
};

std::vector<FakeContainer*> containers;
std::atomic<int> runs_to_refuse{0};
std::atomic<int64_t> run_ns{0};
std::atomic<bool> takes_long_once{false};

int32_t fake_create(void** container, size_t, const char*, const char*) {
  containers.push_back(new FakeContainer);
  *container = containers.back();
  return 0;
}

float* floats(void* tensor) { return static_cast<float*>(static_cast<FakeTensor*>(tensor)->data); }

void sleep_for(int64_t ns) {
  const timespec pause{static_cast<time_t>(ns / 1000000000), static_cast<long>(ns % 1000000000)};
  nanosleep(&pause, nullptr);
}

// What a chunk hands over, from its samples; the same in the loop that the team is compared with.
struct Chunk {
  const float* x;
  const float* y;
  int64_t key;

  float gradient(int64_t i) const {
    return x[i % kSamples] * static_cast<float>(1 + i % 3) + static_cast<float>(key & 3);
  }
  float left(int64_t k, int64_t row) const { return x[(k + row) % kSamples]; }
  float right(int64_t k, int64_t col) const { return y[(k + 2 * col) % kSamples]; }
  float loss(float weight, float factored, float buffer) const {
    return x[0] + y[kSamples - 1] + weight + factored + buffer;
  }
};

int32_t fake_run(void* given, void** inputs, size_t count, void** outputs, size_t, void*, void*) {
  auto* container = static_cast<FakeContainer*>(given);
  if (count != kInputs) return 1;
  CHECK(!container->is_busy.exchange(true));
  int32_t status = 0;
  if (runs_to_refuse > 0) {
    --runs_to_refuse;
    status = 1;
  } else {
    const int64_t key = *static_cast<int64_t*>(static_cast<FakeTensor*>(inputs[kKey])->data);
    const Chunk chunk{floats(inputs[kX]), floats(inputs[kY]), key};
    for (int64_t i = 0; i < kCount; ++i) floats(inputs[kGradient])[i] = chunk.gradient(i);
    for (int64_t k = 0; k < kDepth; ++k) {
      for (int64_t r = 0; r < kRows; ++r) floats(inputs[kLeft])[k * kRows + r] = chunk.left(k, r);
      for (int64_t c = 0; c < kCols; ++c) floats(inputs[kRight])[k * kCols + c] = chunk.right(k, c);
    }
    auto* loss = new float(chunk.loss(floats(inputs[kWeight])[kCount - 1],
                                      floats(inputs[kFactored])[kRows * kCols - 1],
                                      *floats(inputs[kFloatBuffer])));
    *floats(inputs[kFloatBuffer]) += chunk.x[1];
    *static_cast<int64_t*>(static_cast<FakeTensor*>(inputs[kWholeBuffer])->data) += 1;
    if (takes_long_once.exchange(false)) sleep_for(700'000'000);
    if (run_ns > 0) sleep_for(run_ns);
    outputs[0] = make_tensor(loss, {1}, true);
  }
  for (size_t i = 0; i < count; ++i) fake_delete(inputs[i]);  // As a compiled step does.
  container->is_busy = false;
  return status;
}

// ---- A model in memory, and the loop to compare with ------------------------------------------------

// `mix` of data/hashing.py.
uint64_t mixed(uint64_t word) {
  word = (word ^ (word >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
  word = (word ^ (word >> 27)) * UINT64_C(0x94D049BB133111EB);
  return word ^ (word >> 31);
}

int64_t key_of(int64_t step_key, int64_t chunk) {
  constexpr uint64_t kGolden = UINT64_C(0x9E3779B97F4A7C15);
  const uint64_t first = mixed(mixed(static_cast<uint64_t>(step_key) + kGolden));
  return static_cast<int64_t>(mixed(first + mixed(static_cast<uint64_t>(chunk) + kGolden)));
}

struct Model {
  std::vector<float> weight = std::vector<float>(kCount, 1.0f);
  std::vector<float> factored = std::vector<float>(kRows * kCols, 2.0f);
  std::vector<float> gradient = std::vector<float>(kCount, 0.0f);  // Of a weight that is not updated.
  float float_buffer = 0, counter = 0;
  int64_t whole_buffer = 0;

  bool operator==(const Model& other) const {
    return weight == other.weight && factored == other.factored && gradient == other.gradient &&
           float_buffer == other.float_buffer && counter == other.counter &&
           whole_buffer == other.whole_buffer;
  }
};

struct Data {
  std::vector<float> x, y;
  std::vector<int64_t> keys;

  Data(int64_t steps, int64_t chunks, unsigned seed) {
    const auto draw = [&] { return static_cast<float>((seed = seed * 1103515245 + 12345) >> 16 & 3); };
    for (int64_t i = 0; i < steps * chunks * kSamples; ++i) x.push_back(draw()), y.push_back(draw());
    for (int64_t i = 0; i < steps; ++i) keys.push_back(static_cast<int64_t>(seed) * (i + 1) - 7);
  }
};

// SGD with learning rate 1/64 in a plain loop: rounds the way that the kernels do, as nothing is lost.
constexpr double kRate = 1.0 / 64;

float plain_step(Model& model, const Data& data, int64_t step, int64_t chunks) {
  std::vector<Chunk> parts;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t at = (step * chunks + c) * kSamples;
    parts.push_back({&data.x[at], &data.y[at], key_of(data.keys[step], c)});
  }
  double loss = 0, mean = 0;
  for (const Chunk& part : parts) {
    loss += 1.0 / static_cast<double>(chunks) *
            static_cast<double>(part.loss(model.weight[kCount - 1],
                                          model.factored[kRows * kCols - 1], model.float_buffer));
    mean += 1.0 / static_cast<double>(chunks) * static_cast<double>(model.float_buffer + part.x[1]);
  }
  for (int64_t i = 0; i < kCount; ++i) {
    float sum = 0;
    for (const Chunk& part : parts) sum += part.gradient(i);
    model.weight[i] -= static_cast<float>(kRate) * sum;
    model.gradient[i] = sum;
  }
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t c = 0; c < kCols; ++c) {
      float sum = 0;
      for (const Chunk& part : parts)
        for (int64_t k = 0; k < kDepth; ++k) sum += part.left(k, r) * part.right(k, c);
      model.factored[r * kCols + c] -= static_cast<float>(kRate) * sum;
    }
  model.float_buffer = static_cast<float>(mean);
  model.whole_buffer += 1;
  model.counter += 1;
  return static_cast<float>(loss);
}

// ---- A team on such a model --------------------------------------------------------------------------

const int64_t kOne[] = {1}, kStride[] = {1};

TensorSpec spec(void* data, const int64_t* size) { return {data, size, kStride, 1, 6}; }

class Bound {
 public:
  Bound(Model& model, int workers) : model_(model), workers_(workers) {
    std::vector<WorkerPlacement> placements(static_cast<size_t>(workers));
    static const int32_t cpu[] = {0};
    for (WorkerPlacement& placement : placements) placement = {cpu, 0, cpu, 0, -1};
    placements.back().num_cpus = 1;
    TeamOpen open{};
    open.step = {entry(&fake_create), entry(&fake_run)};
    open.num_workers = workers;
    open.placements = placements.data();
    CHECK(hotloop_team_open(&open) == 0);
    team = open.team;
  }

  // Batches have so many chunks from now on.
  void bind(int64_t chunks) {
    chunks_ = chunks;
    gradients_.assign(chunks * kCount, -1);
    left_.assign(chunks * kDepth * kRows, -1);
    right_.assign(chunks * kDepth * kCols, -1);
    float_copies_.assign(chunks, -1);
    whole_copies_.assign(chunks, -1);
    keys_.assign(chunks, 0);
    const std::vector<double> shares(chunks, 1.0 / static_cast<double>(chunks));
    static const int64_t count[] = {kCount}, matrix[] = {kRows * kCols};
    static const int64_t left[] = {kDepth * kRows}, right[] = {kDepth * kCols};
    std::vector<TensorSpec> inputs;
    for (int64_t c = 0; c < chunks; ++c) {
      const TensorSpec mine[] = {
          spec(model_.weight.data(), count),       spec(model_.factored.data(), matrix),
          spec(&float_copies_[c], kOne),           spec(&whole_copies_[c], kOne),
          spec(&gradients_[c * kCount], count),    spec(&left_[c * kDepth * kRows], left),
          spec(&right_[c * kDepth * kCols], right), spec(&keys_[c], kOne)};
      inputs.insert(inputs.end(), mine, mine + kX);
    }
    TeamWeight weights[3] = {};
    weights[0].rows = 1;
    weights[0].cols = kCount;
    weights[0].weight = model_.weight.data();
    weights[0].left = gradients_.data();
    weights[0].chunk_stride = kCount;
    weights[1].factored = 1;
    weights[1].group = 1;
    weights[1].rows = kRows;
    weights[1].cols = kCols;
    weights[1].depth = chunks * kDepth;
    weights[1].weight = model_.factored.data();
    weights[1].left = left_.data();
    weights[1].right = right_.data();
    weights[2] = weights[0];
    weights[2].gradient = model_.gradient.data();
    char* whole = reinterpret_cast<char*>(&model_.whole_buffer);
    const TeamBuffer buffers[] = {
        {sizeof(float), 1, reinterpret_cast<char*>(&model_.float_buffer),
         reinterpret_cast<char*>(float_copies_.data()), sizeof(float)},
        {sizeof(int64_t), 0, whole, reinterpret_cast<char*>(whole_copies_.data()), sizeof(int64_t)}};
    const TeamBind bind{chunks,  inputs.data(), kX, weights, 3, buffers, 2, shares.data(), keys_.data()};
    CHECK(hotloop_team_bind(team, &bind) == 0);
  }

  void balance(const std::vector<int32_t>& quota, int64_t steal_threshold, double hang_s = 0) {
    hotloop_team_balance(team, quota.data(), steal_threshold, hang_s);
  }

  int32_t run(const Data& data, int64_t steps) {
    times.assign(workers_, {});
    losses.assign(steps, -1);
    ControlRow row{};
    row.lr = kRate;
    const std::vector<ControlRow> tables(2 * steps, row);
    float* counters[] = {&model_.counter};
    static const int64_t samples[] = {kSamples};
    TeamRun run{};
    run.x = spec(const_cast<float*>(data.x.data()), samples);
    run.y = spec(const_cast<float*>(data.y.data()), samples);
    run.x_chunk_bytes = run.y_chunk_bytes = kSamples * sizeof(float);
    run.steps = steps;
    run.tables = tables.data();
    run.groups = 2;
    run.losses = losses.data();
    run.counters = counters;
    run.num_counters = 1;
    run.keys = data.keys.data();
    run.times = times.data();
    const int32_t status = hotloop_team_run(team, &run);
    steps_done = run.steps_done;
    hangs = run.hangs != 0;
    return status;
  }

  void* team = nullptr;
  std::vector<WorkerTimes> times;
  std::vector<float> losses;
  int64_t steps_done = 0;
  bool hangs = false;

 private:
  Model& model_;
  const int workers_;
  int64_t chunks_ = 0;
  std::vector<float> gradients_, left_, right_, float_copies_;
  std::vector<int64_t> whole_copies_, keys_;
};

void require_times(const Bound& bound, int64_t chunks) {
  int64_t ran = 0, stolen = 0;
  for (const WorkerTimes& times : bound.times) ran += times.chunks, stolen += times.stolen;
  CHECK(ran == chunks);
  CHECK(stolen <= ran);
}

void compare(Bound& bound, Model& model, Model& expected, int64_t steps, int64_t chunks, unsigned seed) {
  const Data data(steps, chunks, seed);
  CHECK(bound.run(data, steps) == 0);
  CHECK(bound.steps_done == steps && !bound.hangs);
  for (int64_t step = 0; step < steps; ++step)
    CHECK(plain_step(expected, data, step, chunks) == bound.losses[step]);
  CHECK(model == expected);
  require_times(bound, steps * chunks);
}

// Quotas that are as uneven as can be, thresholds, chunks that take longer than others, failing and sleeping ones.
void check_sums(int workers) {
  Model model, expected;
  Bound bound(model, workers);
  unsigned seed = static_cast<unsigned>(workers);
  for (const int64_t chunks : {8, 1, 4, 16}) {
    bound.bind(chunks);
    for (int holder = 0; holder < workers; ++holder)
      for (int64_t threshold = 1; threshold <= 3; ++threshold) {
        std::vector<int32_t> quota(static_cast<size_t>(workers), 0);
        quota[holder] = static_cast<int32_t>(chunks);
        bound.balance(quota, threshold);
        run_ns = holder % 2 ? 50'000 : 0;
        compare(bound, model, expected, 1 + seed % 5, chunks, seed);
        hotloop_team_inject_fault(bound.team, holder, 1 + threshold % 2, 0.002);
        compare(bound, model, expected, 3, chunks, ++seed);
        model = expected = Model();  // Numbers stay small.
      }
  }
  run_ns = 0;
  // Calls of different lengths one after the other.
  std::vector<int32_t> even(static_cast<size_t>(workers), 0);
  for (int c = 0; c < 4; ++c) ++even[c % workers];
  bound.bind(4);
  bound.balance(even, 1);
  for (unsigned call = 0; call < 300; ++call) {
    compare(bound, model, expected, 1 + call % 5, 4, call);
    if (call % 16 == 15) model = expected = Model();
  }
  hotloop_team_close(bound.team);
}

// Chunks ran elsewhere: a step is the update alone, by the losses handed over.
void check_losses_from_elsewhere(int workers) {
  Model model, expected;
  Bound bound(model, workers);
  bound.bind(4);
  std::vector<int32_t> even(static_cast<size_t>(workers), 0);
  even[0] = 4;
  bound.balance(even, 1);
  compare(bound, model, expected, 1, 4, 5);  // Leaves what chunks hand over.
  even[0] = 0;
  bound.balance(even, 1);
  const float losses[] = {1, 2, 3, 6};
  hotloop_team_set_losses(bound.team, losses);
  const std::vector<float> before = model.weight;
  CHECK(bound.run(Data(1, 4, 5), 1) == 0);
  CHECK(bound.losses[0] == 3);
  for (int64_t i = 0; i < kCount; ++i) CHECK(model.weight[i] - before[i] == before[i] - 1);
  hotloop_team_close(bound.team);
}

// A chunk that fails on its worker and again on worker 0: an error, nothing of that step counts.
void check_failing_twice(int workers) {
  Model model;
  Bound bound(model, workers);
  bound.bind(8);
  std::vector<int32_t> quota(static_cast<size_t>(workers), 0);
  quota[workers - 1] = 8;
  bound.balance(quota, 1);
  const Model before = model;
  runs_to_refuse = 1000;
  CHECK(bound.run(Data(2, 8, 1), 2) != 0);
  runs_to_refuse = 0;
  CHECK(bound.steps_done == 0 && !bound.hangs);
  CHECK(model == before);
  CHECK(std::strstr(hotloop_error(), "a compiled step must run"));
  CHECK(bound.run(Data(2, 8, 1), 2) != 0);
  CHECK(std::strstr(hotloop_error(), "given up"));
  hotloop_team_close(bound.team);
}

// A worker that hangs, asleep before its chunk or inside it: the weights are those after whole steps.
void check_hanging(int workers, bool inside) {
  auto* model = new Model;  // The thread that hangs still uses it, and its team, when we have gone on.
  auto* bound = new Bound(*model, workers);
  static auto& kept = *new std::vector<void*>;  // Never destroyed, so that nothing counts as lost.
  kept.push_back(model);
  kept.push_back(bound);
  Model expected;
  bound->bind(4);
  std::vector<int32_t> quota(static_cast<size_t>(workers), 0);
  quota[workers - 1] = 4;
  bound->balance(quota, 100, 0.1);  // Nobody else may take one.
  compare(*bound, *model, expected, 3, 4, 9);
  auto* data = new Data(6, 4, 10);
  kept.push_back(data);
  if (inside) takes_long_once = true;
  else hotloop_team_inject_fault(bound->team, workers - 1, 2, 0.7);
  CHECK(bound->run(*data, 6) != 0);
  CHECK(bound->hangs && bound->steps_done == 0);
  CHECK(model->weight == expected.weight && model->factored == expected.factored);
  kept.push_back(bound->team);
  hotloop_team_close(bound->team);
}

// Memory that workers write first: by rows, by chunks, copied or zero.
void check_fill(int workers) {
  Model model;
  Bound bound(model, workers);
  bound.bind(8);
  std::vector<int32_t> quota(static_cast<size_t>(workers), 0);
  for (int c = 0; c < 8; ++c) ++quota[c * c % workers];
  bound.balance(quota, 1);
  std::vector<char> source(100 * 12), copied(source.size(), 1), zeros(8 * 24, 1);
  for (size_t i = 0; i < source.size(); ++i) source[i] = static_cast<char>(i * 7);
  const TeamFill fills[] = {{copied.data(), source.data(), 100, 12, 16},
                            {zeros.data(), nullptr, 8, 24, 0}};
  CHECK(hotloop_team_fill(bound.team, fills, 2) == 0);
  CHECK(copied == source);
  CHECK(zeros == std::vector<char>(zeros.size(), 0));
  hotloop_team_close(bound.team);
}

// A whole step without a team, by the same fakes.
void check_program() {
  Model model;
  Bound like(model, 1);
  like.bind(1);
  hotloop_team_close(like.team);
  void* program = nullptr;
  const CompiledStep step{entry(&fake_create), entry(&fake_run)};
  CHECK(hotloop_program_open(&step, &program) == 0);
  float gradient[kCount], left[kDepth * kRows], right[kDepth * kCols], buffer = 0;
  int64_t whole = 0, key = 3;
  const TensorSpec inputs[] = {
      spec(model.weight.data(), kOne), spec(model.factored.data(), kOne), spec(&buffer, kOne),
      spec(&whole, kOne), spec(gradient, kOne), spec(left, kOne), spec(right, kOne), spec(&key, kOne)};
  for (int again = 0; again < 2; ++again) CHECK(hotloop_program_bind(program, inputs, kX) == 0);
  const Data data(5, 1, 4);
  float losses[5], counter = 0;
  float* counters[] = {&counter};
  char control[8] = {};
  const char tables[] = "0000000011111111222222223333333344444444";
  static const int64_t samples[] = {kSamples};
  ProgramRun run{};
  run.x = spec(const_cast<float*>(data.x.data()), samples);
  run.y = spec(const_cast<float*>(data.y.data()), samples);
  run.x_step_bytes = run.y_step_bytes = kSamples * sizeof(float);
  run.steps = 5;
  run.tables = tables;
  run.control = control;
  run.table_bytes = sizeof control;
  run.losses = losses;
  run.counters = counters;
  run.num_counters = 1;
  run.num_threads = 1;
  CHECK(hotloop_program_run(program, &run) == 0);
  CHECK(whole == 5 && counter == 5 && std::memcmp(control, "44444444", 8) == 0);
  float expected = 0;
  for (int64_t i = 0; i < 5; ++i) {
    const Chunk chunk{&data.x[i * kSamples], &data.y[i * kSamples], key};
    CHECK(losses[i] == chunk.loss(1, 2, expected));
    expected += chunk.x[1];
  }
  runs_to_refuse = 1;
  CHECK(hotloop_program_run(program, &run) != 0);
  CHECK(std::strstr(hotloop_error(), "a compiled step must run"));
  hotloop_program_close(program);
}

}  // namespace

int main() {
  use_fakes();
  check_program();
  for (int workers = 1; workers <= 4; ++workers) {
    check_sums(workers);
    check_losses_from_elsewhere(workers);
    check_failing_twice(workers);
    check_fill(workers);
  }
  for (int workers = 2; workers <= 4; ++workers)
    for (const bool inside : {false, true}) check_hanging(workers, inside);
  sleep_for(1'200'000'000);  // The threads that hung have ended by now.
  const int64_t of_teams_given_up = tensors_alive;
  check_fill(2);
  CHECK(tensors_alive == of_teams_given_up);
  for (FakeContainer* container : containers) delete container;
  std::puts("done");
  return 0;
}
