// Programs of element-wise operations, run block by block: what they work on between loads and stores stays in
// the first-level cache.
#include <cstring>
#include <string>

#include "abi.h"
#include "error.h"
#include "parallel.h"
#include "vector_functions.h"

namespace hotloop {
namespace {

// In the order of OPERATIONS in kernels/elementwise.py.
enum Opcode : int32_t {
  kLoad, kStore, kConstant, kAdd, kSub, kMul, kDiv, kMax, kMin, kGreater, kGreaterEqual, kLess,
  kLessEqual, kEqual, kNotEqual, kSelect, kFma, kThreshold, kNegative, kAbsolute, kSquare, kRoot,
  kReciprocalRoot, kReciprocal, kExponential, kLogarithm, kTanh, kSigmoid, kErrorFunction, kReluOf,
  kSilu, kGeluOf, kTanhGeluOf, kPower, kOpcodes
};

constexpr int kRegisters = 16;
constexpr int64_t kBlock = 512, kMostOperations = 256;
constexpr float kMostPower = 64;
// Less than so many operations on single elements are one thread's.
constexpr int64_t kOneThreadWork = 131072;

using Operation = ElementwiseOperation;

int operands(int32_t opcode) {
  if (opcode == kConstant) return 0;
  if (opcode == kSelect || opcode == kFma) return 3;
  return (opcode >= kAdd && opcode <= kNotEqual) || opcode == kThreshold ? 2 : 1;
}

bool reads(const Operation& operation, int32_t reg) {
  const int32_t from[] = {operation.a, operation.b, operation.c};
  if (operation.opcode == kLoad) return false;
  for (int i = 0; i < operands(operation.opcode); ++i)
    if (from[i] == reg) return true;
  return false;
}

[[noreturn]] void refuse(int64_t number, const char* why) {
  throw Error("operation " + std::to_string(number) + " of an element-wise program " + why);
}

void check(const ElementwiseCall& call) {
  if (call.num_operations > kMostOperations)
    throw Error("an element-wise program must have at most 256 operations (got: " +
                std::to_string(call.num_operations) + ")");
  bool written[kRegisters] = {};
  for (int64_t i = 0; i < call.num_operations; ++i) {
    const Operation& operation = call.operations[i];
    const bool is_store = operation.opcode == kStore, is_load = operation.opcode == kLoad;
    if (operation.opcode < 0 || operation.opcode >= kOpcodes) refuse(i, "is not known");
    const int32_t tensor = is_store ? operation.out : operation.a;
    if ((is_store || is_load) && (tensor < 0 || tensor >= call.num_tensors))
      refuse(i, "needs a tensor that is there");
    const int32_t from[] = {operation.a, operation.b, operation.c};
    for (int k = 0; !is_load && k < operands(operation.opcode); ++k)
      if (from[k] < -1 || from[k] >= kRegisters || (from[k] >= 0 && !written[from[k]]))
        refuse(i, "reads a register that nothing wrote");
    if (is_store) {
      const ElementwiseTensor& t = call.tensors[tensor];
      if ((t.plane_stride == 0 && call.planes > 1) || (t.row_stride == 0 && call.rows > 1) ||
          (t.col_stride == 0 && call.cols > 1))
        refuse(i, "stores to a tensor that is repeated");
      continue;
    }
    if (operation.out < 0 || operation.out >= kRegisters) refuse(i, "needs a register from 0 to 15");
    if (operation.opcode == kPower && !(std::fabs(operation.constant) <= kMostPower &&
                                        operation.constant == std::trunc(operation.constant)))
      refuse(i, "must have a power that is a whole number from -64 to 64");
    written[operation.out] = true;
  }
}

// Elements [row, row + rows) x [col, col + cols) of a plane, at most kBlock.
struct Block {
  int64_t plane, row, rows, col, cols;

  int64_t count() const { return rows * cols; }
  float* start(const ElementwiseTensor& t) const {
    return t.data + plane * t.plane_stride + row * t.row_stride + col * t.col_stride;
  }
  bool is_dense(const ElementwiseTensor& t) const {
    return (t.col_stride == 1 || cols == 1) && (rows == 1 || t.row_stride == cols);
  }
};

// A program that has been checked, and where its registers may be memory of a tensor itself.
struct Program {
  const ElementwiseCall& call;
  int64_t rows, cols;  // One row where all tensors go on from row to row.
  bool in_place[kMostOperations];

  explicit Program(const ElementwiseCall& given) : call(given), rows(given.rows), cols(given.cols) {
    check(call);
    bool flat = true;
    for (int64_t i = 0; i < call.num_tensors; ++i) {
      const ElementwiseTensor& t = call.tensors[i];
      flat = flat && (rows == 1 || t.row_stride == t.col_stride * cols);
    }
    if (flat) cols *= rows, rows = rows > 0;
    for (int64_t i = 0; i < call.num_operations; ++i) {
      const Operation& now = call.operations[i];
      in_place[i] = now.opcode == kLoad
                        ? keeps(i + 1, now.out, call.tensors[now.a].data)
                        : is_stored_next(i) && keeps(i + 2, now.out, stored(i + 1).data);
    }
  }

  bool is_stored_next(int64_t i) const {
    if (i + 1 >= call.num_operations || call.operations[i].opcode == kStore) return false;
    const Operation& next = call.operations[i + 1];
    return next.opcode == kStore && next.a == call.operations[i].out;
  }
  const ElementwiseTensor& stored(int64_t store) const {
    return call.tensors[call.operations[store].out];
  }

 private:
  // Whether a register that is the memory at `data` has its value at all reads from operation i on.
  bool keeps(int64_t i, int32_t reg, const float* data) const {
    bool is_changed = false;
    for (; i < call.num_operations; ++i) {
      const Operation& operation = call.operations[i];
      if (reads(operation, reg) && is_changed) return false;
      if (operation.opcode == kStore) is_changed = is_changed || stored(i).data == data;
      else if (operation.out == reg) return true;
    }
    return true;
  }
};

template <class F>
void map(int64_t n, float* out, const float* a, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(a + i)));
  if (i < n) store_tail(out + i, f(load_tail(a + i, n - i)), n - i);
}

template <class F>
void map(int64_t n, float* out, const float* a, const float* b, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(a + i), load(b + i)));
  if (i < n)
    store_tail(out + i, f(load_tail(a + i, n - i), load_tail(b + i, n - i)), n - i);
}

template <class F>
void map(int64_t n, float* out, const float* a, const float* b, const float* c, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(out + i, f(load(a + i, n - i), load(b + i, n - i), load(c + i, n - i)), n - i);
}

Vector as_number(Words holds) {
  const Vector one = Vector{} + 1.0f;
  return holds ? one : Vector{};
}

Vector power(Vector x, int exponent) {
  Vector result = Vector{} + 1.0f;
  for (int left = std::abs(exponent); left; left /= 2) {
    if (left % 2) result *= x;
    if (left > 1) x *= x;
  }
  return exponent < 0 ? 1.0f / result : result;
}

// The registers of one thread.
class Registers {
 public:
  Registers(const Program& program, float* storage) : program_(program), storage_(storage) {}

  void run(const Block& block) {
    block_ = block;
    for (int64_t i = 0; i < program_.call.num_operations; ++i) {
      const Operation& now = program_.call.operations[i];
      if (now.opcode == kLoad) load_tensor(now, program_.in_place[i]);
      else if (now.opcode == kStore) store_tensor(now);
      else compute(i, now);
    }
  }

 private:
  float* own(int32_t reg) { return storage_ + reg * kBlock; }

  void load_tensor(const Operation& now, bool in_place) {
    const ElementwiseTensor& t = program_.call.tensors[now.a];
    const float* from = block_.start(t);
    if (in_place && block_.is_dense(t)) {
      at_[now.out] = from;
      return;
    }
    float* to = own(now.out);
    at_[now.out] = to;
    for (int64_t row = 0; row < block_.rows; ++row, to += block_.cols, from += t.row_stride) {
      if (t.col_stride == 1) std::memcpy(to, from, static_cast<size_t>(block_.cols) * sizeof(float));
      else for (int64_t c = 0; c < block_.cols; ++c) to[c] = from[c * t.col_stride];
    }
  }

  void store_tensor(const Operation& now) {
    const ElementwiseTensor& t = program_.call.tensors[now.out];
    const float* from = at_[now.a >= 0 ? now.a : fill(now.constant)];
    float* to = block_.start(t);
    if (from == to && block_.is_dense(t)) return;
    for (int64_t row = 0; row < block_.rows; ++row, from += block_.cols, to += t.row_stride) {
      if (t.col_stride == 1) std::memcpy(to, from, static_cast<size_t>(block_.cols) * sizeof(float));
      else for (int64_t c = 0; c < block_.cols; ++c) to[c * t.col_stride] = from[c];
    }
  }

  // The register after the last one, all of it `value`.
  int32_t fill(float value) {
    float* to = own(kRegisters);
    std::fill(to, to + block_.count(), value);
    at_[kRegisters] = to;
    return kRegisters;
  }

  const float* operand(int32_t reg, float constant) { return at_[reg >= 0 ? reg : fill(constant)]; }

  void compute(int64_t i, const Operation& now) {
    const int64_t n = block_.count();
    const bool direct =
        program_.in_place[i] && block_.is_dense(program_.stored(i + 1));
    float* out = direct ? block_.start(program_.stored(i + 1)) : own(now.out);
    switch (operands(now.opcode)) {
      case 0: std::fill(out, out + n, now.constant); break;
      case 1: compute_one(now, n, out, operand(now.a, now.constant)); break;
      case 2:
        if (now.b < 0 && now.opcode != kThreshold) compute_constant(now, n, out);
        else compute_two(now, n, out);
        break;
      default: compute_three(now, n, out);
    }
    at_[now.out] = out;
  }

  static void compute_one(const Operation& now, int64_t n, float* out, const float* a) {
    switch (now.opcode) {
      case kNegative: return map(n, out, a, [](Vector x) { return -x; });
      case kAbsolute: return map(n, out, a, [](Vector x) { return absolute(x); });
      case kSquare: return map(n, out, a, [](Vector x) { return x * x; });
      case kRoot: return map(n, out, a, [](Vector x) { return square_root(x); });
      case kReciprocalRoot: return map(n, out, a, [](Vector x) { return 1.0f / square_root(x); });
      case kReciprocal: return map(n, out, a, [](Vector x) { return 1.0f / x; });
      case kExponential: return map(n, out, a, [](Vector x) { return full_exponential(x); });
      case kLogarithm: return map(n, out, a, [](Vector x) { return logarithm(x); });
      case kTanh: return map(n, out, a, [](Vector x) { return hyperbolic_tangent(x); });
      case kSigmoid: return map(n, out, a, [](Vector x) { return sigmoid(x); });
      case kErrorFunction: return map(n, out, a, [](Vector x) { return full_error_function(x); });
      case kReluOf: return map(n, out, a, [](Vector x) { return x < 0 ? Vector{} : x; });
      case kSilu: return map(n, out, a, [](Vector x) { return x / (1.0f + full_exponential(-x)); });
      case kGeluOf:
        return map(n, out, a, [](Vector x) {
          return 0.5f * x * (1.0f + full_error_function(x * 0.707106781f));
        });
      case kTanhGeluOf:
        return map(n, out, a, [](Vector x) {
          const Vector inner = 1.59576912f * (x + 0.044715f * x * x * x);
          return x / (1.0f + full_exponential(-inner));
        });
      default: {
        const int exponent = static_cast<int>(now.constant);
        return map(n, out, a, [=](Vector x) { return power(x, exponent); });
      }
    }
  }

  // Calls body(f) with the function of two Vectors that an operation is.
  template <class Body>
  static void with_function(int32_t opcode, const Body& body) {
    switch (opcode) {
      case kAdd: return body([](Vector a, Vector b) { return a + b; });
      case kSub: return body([](Vector a, Vector b) { return a - b; });
      case kMul: return body([](Vector a, Vector b) { return a * b; });
      case kDiv: return body([](Vector a, Vector b) { return a / b; });
      case kMax: return body([](Vector a, Vector b) { return (a > b) | (a != a) ? a : b; });
      case kMin: return body([](Vector a, Vector b) { return (a < b) | (a != a) ? a : b; });
      case kGreater: return body([](Vector a, Vector b) { return as_number(a > b); });
      case kGreaterEqual: return body([](Vector a, Vector b) { return as_number(a >= b); });
      case kLess: return body([](Vector a, Vector b) { return as_number(a < b); });
      case kLessEqual: return body([](Vector a, Vector b) { return as_number(a <= b); });
      case kEqual: return body([](Vector a, Vector b) { return as_number(a == b); });
      default: return body([](Vector a, Vector b) { return as_number(a != b); });
    }
  }

  void compute_constant(const Operation& now, int64_t n, float* out) {
    const float* a = operand(now.a, now.constant);
    const Vector b = Vector{} + now.constant;
    with_function(now.opcode, [&](auto f) { map(n, out, a, [=](Vector x) { return f(x, b); }); });
  }

  void compute_two(const Operation& now, int64_t n, float* out) {
    const float *a = operand(now.a, now.constant), *b = operand(now.b, now.constant);
    if (now.opcode == kThreshold) {
      const float least = now.constant;
      map(n, out, a, b, [=](Vector x, Vector y) { return y <= least ? Vector{} : x; });
    } else {
      with_function(now.opcode, [&](auto f) { map(n, out, a, b, f); });
    }
  }

  void compute_three(const Operation& now, int64_t n, float* out) {
    const float *a = operand(now.a, now.constant), *b = operand(now.b, now.constant);
    const float* c = operand(now.c, now.constant);
    if (now.opcode == kSelect)
      map(n, out, a, b, c, [](Vector x, Vector y, Vector z) { return z != 0.0f ? x : y; });
    else map(n, out, a, b, c, [](Vector x, Vector y, Vector z) { return x * y + z; });
  }

  const Program& program_;
  float* storage_;
  const float* at_[kRegisters + 1] = {};
  Block block_{};
};

void elementwise(const ElementwiseCall& call) {
  const Program program(call);
  const int64_t rows = program.rows, cols = program.cols;
  if (rows == 0 || cols == 0) return;
  // Parts of long rows, or several short ones.
  const int64_t block_cols = std::min(cols, kBlock);
  const int64_t block_rows = cols < kBlock ? kBlock / cols : 1;
  const int64_t across = (cols + block_cols - 1) / block_cols;
  const int64_t plane_blocks = (rows + block_rows - 1) / block_rows * across;
  const bool few = call.planes * rows * cols * call.num_operations < kOneThreadWork;
  parallel(few ? 1 : static_cast<int>(call.num_threads), [&](Worker worker) {
    alignas(64) float storage[(kRegisters + 1) * kBlock];
    Registers registers(program, storage);
    const Range mine = share(call.planes * plane_blocks, 1, worker);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t plane = i / plane_blocks, at = i % plane_blocks;
      const int64_t row = at / across * block_rows, col = at % across * block_cols;
      registers.run({plane, row, std::min(block_rows, rows - row), col,
                     std::min(block_cols, cols - col)});
    }
  });
}

}  // namespace
}  // namespace hotloop

HOTLOOP_EXPORT int32_t hotloop_elementwise(const hotloop::ElementwiseCall* call) {
  return hotloop::guarded([&] { hotloop::elementwise(*call); });
}
