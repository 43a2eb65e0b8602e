// The team of threads under a sanitizer: torch and the chunk's program are fakes, all numbers are small whole
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
  torch.torch_get_num_threads = entry(&fake_num_threads);
  torch.MKL_Set_Num_Threads_Local = entry(&fake_mkl);
  hotloop_use_torch(&torch);
}

// ---- A fake of a chunk's program --------------------------------------------------------------------

// Of a weight [kCount], a weight [kRows, kCols] whose gradient is handed over as factors [kDepth, kRows] and
// [kDepth, kCols], a float buffer and a whole-number buffer.
constexpr int64_t kCount = 37, kRows = 19, kCols = 5, kDepth = 2, kSamples = 3;

std::atomic<int> runs_to_refuse{0};
std::atomic<int64_t> run_ns{0};
std::atomic<bool> takes_long_once{false};

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

// What one worker's program works on.
struct WorkerMemory {
  const float* weight;
  const float* factored;
  float x[kSamples], y[kSamples], gradient[kCount], left[kDepth * kRows], right[kDepth * kCols], loss, float_buffer;
  int64_t whole_buffer, key;
  std::atomic<bool> is_busy{false};
};

int32_t fake_chunk(void* given) {
  auto& own = *static_cast<WorkerMemory*>(given);
  CHECK(!own.is_busy.exchange(true));
  int32_t status = 0;
  if (runs_to_refuse > 0) {
    --runs_to_refuse;
    hotloop_set_error("this chunk does not want to");
    status = 1;
  } else {
    const Chunk chunk{own.x, own.y, own.key};
    for (int64_t i = 0; i < kCount; ++i) own.gradient[i] = chunk.gradient(i) / 2;  // Handed over twice as large.
    for (int64_t k = 0; k < kDepth; ++k) {
      for (int64_t r = 0; r < kRows; ++r) own.left[k * kRows + r] = chunk.left(k, r);
      for (int64_t c = 0; c < kCols; ++c) own.right[k * kCols + c] = chunk.right(k, c);
    }
    own.loss = chunk.loss(own.weight[kCount - 1], own.factored[kRows * kCols - 1], own.float_buffer);
    own.float_buffer += chunk.x[1];
    own.whole_buffer += 1;
    if (takes_long_once.exchange(false)) sleep_for(700'000'000);
    if (run_ns > 0) sleep_for(run_ns);
  }
  own.is_busy = false;
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

// Rows that chunks find and leave.
struct Rows {
  std::vector<float> gradients, left, right, float_copies, losses;
  std::vector<int64_t> whole_copies, keys;

  explicit Rows(int64_t chunks = 0)
      : gradients(chunks * kCount, -1), left(chunks * kDepth * kRows, -1), right(chunks * kDepth * kCols, -1),
        float_copies(chunks, -1), losses(chunks, -1), whole_copies(chunks, -1), keys(chunks, 0) {}
};

template <class Value>
ChunkCopy take(const Value* source, Value* target, int64_t count, int64_t step) {
  const int64_t size = sizeof(Value);
  return {reinterpret_cast<const char*>(source), reinterpret_cast<char*>(target), count * size, step * size, 0, 0};
}

template <class Value>
ChunkCopy give(const Value* source, Value* target, int64_t count, float scale = 0) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(Value));
  return {reinterpret_cast<const char*>(source), reinterpret_cast<char*>(target), bytes, 0, bytes, scale};
}

// The program of one worker.
struct Program {
  WorkerMemory memory{};
  std::vector<ChunkCopy> taken, given;
  Instruction instruction{};
  ChunkProgram record{};

  void bind(const Model& model, Rows& rows, const float* x, const float* y) {
    WorkerMemory& own = memory;
    own.weight = model.weight.data();
    own.factored = model.factored.data();
    taken = {take(x, own.x, kSamples, kSamples), take(y, own.y, kSamples, kSamples),
             take(&model.float_buffer, &own.float_buffer, 1, 0), take(&model.whole_buffer, &own.whole_buffer, 1, 0),
             take(rows.keys.data(), &own.key, 1, 1)};
    given = {give(&own.loss, rows.losses.data(), 1),
             give(own.gradient, rows.gradients.data(), kCount, 2.0f),
             give(own.left, rows.left.data(), kDepth * kRows),
             give(own.right, rows.right.data(), kDepth * kCols),
             give(&own.float_buffer, rows.float_copies.data(), 1),
             give(&own.whole_buffer, rows.whole_copies.data(), 1)};
    instruction = {entry(&fake_chunk), &own, nullptr, 0};
    const int64_t num_taken = static_cast<int64_t>(taken.size()), num_given = static_cast<int64_t>(given.size());
    record = {taken.data(), num_taken, 2, &instruction, 1, given.data(), num_given};
  }
};

class Bound {
 public:
  Bound(Model& model, int workers) : model_(model), workers_(workers), programs_(workers) {
    std::vector<WorkerPlacement> placements(static_cast<size_t>(workers));
    static const int32_t cpu[] = {0};
    for (WorkerPlacement& placement : placements) placement = {cpu, 0, cpu, 0, -1};
    placements.back().num_cpus = 1;
    TeamOpen open{};
    open.num_workers = workers;
    open.placements = placements.data();
    CHECK(hotloop_team_open(&open) == 0);
    team = open.team;
  }

  // Batches have so many chunks from now on.
  void bind(int64_t chunks) {
    rows = Rows(chunks);
    std::vector<ChunkProgram> programs;
    for (Program& program : programs_) {
      program.bind(model_, rows, nullptr, nullptr);
      programs.push_back(program.record);
    }
    TeamWeight weights[3] = {};
    weights[0].rows = 1;
    weights[0].cols = kCount;
    weights[0].weight = model_.weight.data();
    weights[0].left = rows.gradients.data();
    weights[0].chunk_stride = kCount;
    weights[1].factored = 1;
    weights[1].group = 1;
    weights[1].rows = kRows;
    weights[1].cols = kCols;
    weights[1].depth = chunks * kDepth;
    weights[1].weight = model_.factored.data();
    weights[1].left = rows.left.data();
    weights[1].right = rows.right.data();
    weights[2] = weights[0];
    weights[2].gradient = model_.gradient.data();
    char* whole = reinterpret_cast<char*>(&model_.whole_buffer);
    const TeamBuffer buffers[] = {
        {sizeof(float), 1, reinterpret_cast<char*>(&model_.float_buffer),
         reinterpret_cast<char*>(rows.float_copies.data()), sizeof(float)},
        {sizeof(int64_t), 0, whole, reinterpret_cast<char*>(rows.whole_copies.data()), sizeof(int64_t)}};
    const TeamBind bind{chunks,  programs.data(), weights, 3, buffers, 2, 1.0 / static_cast<double>(chunks),
                        rows.keys.data(), rows.losses.data()};
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
    batch_[0] = reinterpret_cast<const char*>(data.x.data());
    batch_[1] = reinterpret_cast<const char*>(data.y.data());
    TeamRun run{};
    run.batch = batch_;
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
  Rows rows;
  std::vector<WorkerTimes> times;
  std::vector<float> losses;
  int64_t steps_done = 0;
  bool hangs = false;

 private:
  Model& model_;
  const int workers_;
  std::vector<Program> programs_;
  const char* batch_[2] = {};  // A thread that hangs reads it when the call is over.
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
  bound.rows.losses = {1, 2, 3, 6};
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
  CHECK(std::strstr(hotloop_error(), "this chunk does not want to"));
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

// A chunk without a team: its batch lies where the copies say.
void check_chunk_alone() {
  const Model model;
  Rows rows(4);
  const Data data(1, 4, 4);
  Program program;
  program.bind(model, rows, data.x.data(), data.y.data());
  for (const int64_t c : {2, 0, 3, 1}) {
    rows.keys[c] = c - 1;
    CHECK(hotloop_chunk_run(&program.record, c) == 0);
  }
  for (int64_t c = 0; c < 4; ++c) {
    const Chunk chunk{&data.x[c * kSamples], &data.y[c * kSamples], c - 1};
    CHECK(rows.losses[c] == chunk.loss(1, 2, 0));
    CHECK(rows.float_copies[c] == chunk.x[1] && rows.whole_copies[c] == 1);
    for (int64_t i = 0; i < kCount; ++i) CHECK(rows.gradients[c * kCount + i] == chunk.gradient(i));
  }
  runs_to_refuse = 1;
  CHECK(hotloop_chunk_run(&program.record, 0) != 0);
  CHECK(std::strstr(hotloop_error(), "this chunk does not want to"));
}

}  // namespace

int main() {
  use_fakes();
  check_chunk_alone();
  for (int workers = 1; workers <= 4; ++workers) {
    check_sums(workers);
    check_losses_from_elsewhere(workers);
    check_failing_twice(workers);
    check_fill(workers);
  }
  for (int workers = 2; workers <= 4; ++workers)
    for (const bool inside : {false, true}) check_hanging(workers, inside);
  sleep_for(1'200'000'000);  // The threads that hung have ended by now.
  std::puts("done");
  return 0;
}
