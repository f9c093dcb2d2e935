// The engine of the incremental sampler: reads the program, lays out the workspace and drives the kernels. See sample.h.
//
// Workspace: one ring of rows per buffer, [rows][left + width + right][batch][channels rounded up to 16]; the margins stay zero, so a tap
// outside the map multiplies zeros. Position and image share one axis m = (column - c0) * batch + image, so a tap is a shifted matrix.
#include "sample.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "view.h"

namespace vqfast {
namespace {

enum Op : int64_t { kEmbed = 1, kCondition = 2, kConv = 3, kAttend = 4, kPrevious = 5 };
enum Epilogue : int64_t { kNone = 0, kRelu = 1, kElu = 2, kGate = 3, kGlu = 4 };

struct Buffer {
  int64_t kind, channels, rows, left, right;  // kind 1, an attention cache: heads, key channels, value channels, 0
  int64_t stride, offset;                     // floats
};

struct Tap {
  int64_t buffer, dy, dx, channels;
};

struct Instruction {
  int64_t op, phase;
  int64_t table, out;                                                        // kEmbed, kCondition, kPrevious
  int64_t outputs, epilogue, init_kind, init, classes, weight, raw, residual, act, act_kind, depth;  // kConv
  std::vector<Tap> taps;
  int64_t q, k, v, cache, heads, key, value, scale;                          // kAttend
};

[[noreturn]] void malformed(const std::string& what) {
  throw std::invalid_argument("sample: malformed program: " + what + "; build it with vqfast.models.sampling.compile_prior.");
}

int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

struct Program {
  int64_t codebook_size, logits, classes, condition;
  std::vector<Buffer> buffers;
  std::vector<Instruction> code;
  int64_t workspace = 0;
};

// Reads the int64 stream word by word; every index is checked before anything runs.
class Reader {
 public:
  explicit Reader(const SampleArgs& args) : args_(args) {}

  Program read() {
    if (next() != kSampleVersion) malformed("unknown version");
    Program p;
    const int64_t buffers = count(), instructions = count();
    p.codebook_size = next();
    p.logits = next();
    p.classes = next();
    p.condition = next();
    if (p.codebook_size < 1 || p.classes < 0 || p.condition < 0) malformed("negative size");
    if (p.condition > 0 && args_.condition == nullptr) malformed("the network needs a condition");
    for (int64_t i = 0; i < buffers; ++i) add_buffer(p);
    if (buffer(p, p.logits).channels < p.codebook_size) malformed("logits buffer too small");
    for (int64_t i = 0; i < instructions; ++i) p.code.push_back(instruction(p));
    return p;
  }

 private:
  int64_t next() {
    if (at_ >= args_.program_size) malformed("it ends early");
    return args_.program[at_++];
  }
  int64_t count() {
    const int64_t n = next();
    if (n < 0 || n > args_.program_size) malformed("a count is out of range");
    return n;
  }
  int64_t size(int64_t most) {
    const int64_t n = next();
    if (n < 0 || n > most) malformed("a size is out of range");
    return n;
  }

  void add_buffer(Program& p) {
    Buffer b{};
    b.kind = size(1);
    b.channels = size(1 << 20);
    b.rows = size(1 << 20);
    b.left = size(1 << 20);
    b.right = size(1 << 20);
    b.offset = p.workspace;
    b.stride = round_up(b.channels, 16);
    if (b.channels < 1 || b.rows < 1) malformed("an empty buffer");
    const double positions = static_cast<double>(args_.height) * static_cast<double>(args_.width);
    const double rough = b.kind == 0 ? static_cast<double>(b.rows) * static_cast<double>(b.left + args_.width + b.right) * b.stride
                                     : static_cast<double>(b.channels) * (b.rows + b.left + 32.0) * (positions + 16.0);
    if (rough * static_cast<double>(args_.batch) > 1e15) malformed("the workspace would pass 2^50 floats");
    const int64_t steps = args_.height * args_.width;
    const int64_t floats = b.kind == 0 ? b.rows * (b.left + args_.width + b.right) * b.stride
                                       : b.channels * (b.rows * round_up(steps, 16) + steps * round_up(b.left, 16));
    p.workspace += args_.batch * floats;
    p.buffers.push_back(b);
  }

  const Buffer& buffer(const Program& p, int64_t index) {
    if (index < 0 || index >= static_cast<int64_t>(p.buffers.size())) malformed("no such buffer");
    return p.buffers[index];
  }
  int64_t ring(const Program& p, int64_t channels) {
    const int64_t index = next();
    const Buffer& b = buffer(p, index);
    if (b.kind != 0 || b.channels < channels) malformed("a buffer is too small");
    return index;
  }
  int64_t optional_ring(const Program& p, int64_t channels) {
    if (args_.program[at_ < args_.program_size ? at_ : 0] == -1) return next();
    return ring(p, channels);
  }
  int64_t floats(int64_t length) {
    const int64_t offset = next();
    if (offset < 0 || length < 0 || length > args_.weights_size || offset > args_.weights_size - length)
      malformed("it reads past the weights");
    return offset;
  }

  Instruction instruction(const Program& p) {
    Instruction i{};
    i.op = next();
    i.phase = size(1);
    if (i.op == kEmbed || i.op == kPrevious) {
      const int64_t channels = size(1 << 20);
      i.table = floats(p.codebook_size * channels);
      i.out = ring(p, channels);
      i.outputs = channels;
    } else if (i.op == kCondition) {
      i.out = ring(p, p.condition);
    } else if (i.op == kConv) {
      convolution(p, i);
    } else if (i.op == kAttend) {
      attention(p, i);
    } else {
      malformed("unknown instruction");
    }
    return i;
  }

  void convolution(const Program& p, Instruction& i) {
    i.outputs = size(1 << 20);
    i.epilogue = size(kGlu);
    const bool gated = i.epilogue >= kGate;
    if (i.outputs < 1 || (gated && i.outputs % 2)) malformed("a gated convolution needs an even number of outputs");
    const int64_t results = gated ? i.outputs / 2 : i.outputs;
    i.init_kind = size(1);
    i.init = i.init_kind == 0 ? floats(i.outputs) : ring(p, i.outputs);
    i.classes = args_.program[at_ < args_.program_size ? at_ : 0] == -1 ? next() : floats(p.classes * i.outputs);
    const int64_t weight_word = at_;
    next();
    i.out = optional_ring(p, results);
    i.raw = optional_ring(p, i.outputs);
    i.residual = optional_ring(p, results);
    i.act = optional_ring(p, results);
    i.act_kind = size(kElu);
    i.depth = 0;
    const int64_t taps = count();
    for (int64_t t = 0; t < taps; ++t) {
      Tap tap{next(), next(), next(), size(1 << 20)};
      const Buffer& b = buffer(p, tap.buffer);
      if (b.kind != 0 || tap.channels > b.channels || tap.dy > 0 || -tap.dy >= b.rows || -tap.dx > b.left || tap.dx > b.right)
        malformed("a tap leaves its buffer");
      i.depth += tap.channels;
      i.taps.push_back(tap);
    }
    const int64_t end = at_;
    at_ = weight_word;
    i.weight = floats(panels(i) * i.depth * kWeightPanel);
    at_ = end;
  }

  void attention(const Program& p, Instruction& i) {
    i.heads = size(1 << 16);
    i.key = size(1 << 16);
    i.value = size(1 << 16);
    i.q = ring(p, i.heads * i.key);
    i.k = ring(p, i.heads * i.key);
    i.v = ring(p, i.heads * i.value);
    i.out = ring(p, i.heads * i.value);
    i.cache = next();
    const Buffer& c = buffer(p, i.cache);
    if (c.kind != 1 || c.channels != i.heads || c.rows != i.key || c.left != i.value || i.heads < 1) malformed("the cache does not fit");
    i.scale = floats(1);
    if (i.phase != 1) malformed("attention belongs to the pixel phase");
  }

 public:
  static int64_t panels(const Instruction& i) {
    return i.epilogue >= kGate ? (i.outputs / 2 + kHalf - 1) / kHalf : (i.outputs + kWeightPanel - 1) / kWeightPanel;
  }

 private:
  const SampleArgs& args_;
  int64_t at_ = 0;
};

// Threads meet here after every instruction: about every microsecond, so they spin, but only for a few of them; on a busy machine the
// thread that is waited for may need this very core. Thread 0 keeps the time that it lost beyond that.
class Barrier {
 public:
  using Clock = std::chrono::steady_clock;

  void wait(int thread) {
    const int threads = threads_;  // read before arriving: thread 0 may go on alone once all have arrived
    if (threads == 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; spin < 100; ++spin) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
    const auto begin = Clock::now();
    while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    if (thread == 0) lost_ += Clock::now() - begin;
  }

  // For thread 0, before a meeting: have the last few milliseconds gone mostly into waiting? Then other work has the cores.
  bool mostly_waiting() {
    const auto now = Clock::now(), since = window_;
    if (now - since < std::chrono::milliseconds(2)) return false;
    const bool waiting = 4 * lost_ > 3 * (now - since);
    window_ = now;
    lost_ = {};
    return waiting;
  }

  // How many meet: before the first meeting, or by thread 0 once the others are leaving.
  void set_threads(int threads) { threads_ = threads; }

 private:
  int threads_ = 1;
  Clock::duration lost_{};
  Clock::time_point window_ = Clock::now();
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Range {
  int64_t begin, end;
};

Range share(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

class Engine {
 public:
  Engine(const SampleArgs& args, const SampleKernels& kernels, const Program& program)
      : a_(args), k_(kernels), p_(program), threads_(std::max(1, args.threads)), changed_(args.batch * args.width), scratch_(threads_) {
    int64_t mixed = 0;
    for (const auto& i : p_.code) mixed = i.op == kAttend ? std::max(mixed, round_up(i.value, 16)) : mixed;
    for (Scratch& s : scratch_) {
      s.acc.resize(kRowChunk * kWeightPanel);
      s.scores.resize(round_up(a_.height * a_.width, 16));
      s.mixed.resize(mixed);
      s.draw.resize(draw_scratch(p_.codebook_size));
      s.order.resize(p_.codebook_size);
    }
  }

  int64_t run() {
    std::vector<std::thread> helpers;
    helpers.reserve(threads_ - 1);
    try {
      for (int t = 1; t < threads_; ++t) helpers.emplace_back([this, t] { help(t); });
    } catch (const std::exception&) {
      // The system gives no more threads. The work is shared by those that are there: its split changes no bit.
    }
    threads_ = 1 + static_cast<int>(helpers.size());
    barrier_.set_threads(threads_);
    started_.store(true, std::memory_order_release);
    work(0);
    for (auto& h : helpers) h.join();
    return evaluated_;
  }

 private:
  // What one thread needs. All of it is there before a thread starts: where memory runs out, a thread could only end the process,
  // since even to throw takes memory of its own.
  struct Scratch {
    std::vector<float> acc, scores, mixed;
    std::vector<double> draw;
    std::vector<int64_t> order;
  };

  void help(int thread) noexcept {
    while (!started_.load(std::memory_order_acquire)) std::this_thread::yield();
    work(thread);
  }

  // Allocates nothing and throws nothing.
  void work(int thread) noexcept {
    const FloatMode mode;
    Scratch& scratch = scratch_[thread];
    if (a_.start == 0) {
      const Range part = share(p_.workspace, thread, threads_);
      std::fill(a_.workspace + part.begin, a_.workspace + part.end, 0.0f);
      barrier_.wait(thread);
    }
    for (int64_t position = a_.start; position < a_.stop;) {
      const int64_t row = position / a_.width, column = position % a_.width;
      const int64_t row_end = std::min(a_.width, column + a_.stop - position);
      if (column == 0) {
        if (a_.lookahead > 1) guess_row(row, thread);
        for (const auto& i : p_.code)
          if (i.phase == 0) execute(i, row, 0, a_.width, thread, scratch);
      }
      const int64_t window = a_.mode == kScore ? a_.width : std::max<int64_t>(1, a_.lookahead);
      const int64_t end = std::min(row_end, column + window);
      for (const auto& i : p_.code)
        if (i.phase == 1) execute(i, row, column, end, thread, scratch);
      choose(row, column, end, thread, scratch);
      position += a_.mode == kScore ? end - column : accepted(column, end);
      if (thread == 0) evaluated_ += end - column;
      if (thread == 0 && threads_ > 1 && barrier_.mostly_waiting()) alone_.store(true, std::memory_order_relaxed);
      barrier_.wait(thread);  // nobody may overwrite changed_ before all have read it
      if (alone_.load(std::memory_order_relaxed)) {
        // On a crowded machine thread 0 is faster without the others: the split of work changes no bit.
        if (thread != 0) return;
        threads_ = 1;
        barrier_.set_threads(1);
      }
    }
  }

  // ---- tokens ----

  int64_t& token(int64_t image, int64_t row, int64_t column) { return a_.tokens[(image * a_.height + row) * a_.width + column]; }

  bool is_given(int64_t image, int64_t row, int64_t column) const {
    return a_.mode == kScore || (a_.given && a_.given[(image * a_.height + row) * a_.width + column]);
  }

  // The first guess of a speculative row: the codes above.
  void guess_row(int64_t row, int thread) {
    const Range part = share(a_.batch, thread, threads_);
    for (int64_t b = part.begin; b < part.end; ++b)
      for (int64_t j = 0; j < a_.width; ++j)
        if (!is_given(b, row, j)) token(b, row, j) = row > 0 ? token(b, row - 1, j) : 0;
    barrier_.wait(thread);
  }

  void choose(int64_t row, int64_t c0, int64_t c1, int thread, Scratch& s) {
    const Buffer& logits = p_.buffers[p_.logits];
    const DrawSettings settings{p_.codebook_size, a_.seed, a_.temperature, a_.top_p, a_.top_k};
    const Range part = share((c1 - c0) * a_.batch, thread, threads_);
    for (int64_t m = part.begin; m < part.end; ++m) {
      const int64_t column = c0 + m / a_.batch, image = m % a_.batch;
      const float* values = at(logits, row, c0) + m * logits.stride;
      int64_t& slot = token(image, row, column);
      const int64_t position = row * a_.width + column;
      const int64_t drawn = is_given(image, row, column)
                                ? slot
                                : draw_token(values, settings, a_.first_image + image, position, s.draw.data(), s.order.data());
      changed_[column * a_.batch + image] = drawn != slot;
      slot = drawn;
      const int64_t place = image * a_.height * a_.width + position;
      if (a_.logits) std::memcpy(a_.logits + place * p_.codebook_size, values, p_.codebook_size * sizeof(float));
      if (a_.log_prob) a_.log_prob[place] = token_log_prob(values, p_.codebook_size, drawn);
    }
    barrier_.wait(thread);
  }

  // Columns whose every earlier guess in the window was right: they and their caches are final. The first one always is.
  int64_t accepted(int64_t c0, int64_t c1) const {
    for (int64_t column = c0; column < c1; ++column)
      for (int64_t b = 0; b < a_.batch; ++b)
        if (changed_[column * a_.batch + b]) return column + 1 - c0;
    return c1 - c0;
  }

  // ---- instructions ----

  float* at(const Buffer& b, int64_t row, int64_t column) {
    const int64_t slot = ((row % b.rows) + b.rows) % b.rows;
    return a_.workspace + b.offset + ((slot * (b.left + a_.width + b.right)) + b.left + column) * a_.batch * b.stride;
  }

  void execute(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread, Scratch& s) {
    if (i.op == kEmbed) {
      // Row phase: the row above, complete by now. Pixel phase: the columns just before the range.
      if (i.phase == 0 && row > 0) embed(i, row - 1, 0, a_.width, thread);
      if (i.phase == 1) embed(i, row, std::max<int64_t>(c0 - 1, 0), c1 - 1, thread);
    } else if (i.op == kPrevious) {
      previous(i, row, c0, c1, thread);
    } else if (i.op == kCondition) {
      condition(i, row, c0, c1, thread);
    } else if (i.op == kConv) {
      convolve(i, row, c0, c1, thread, s);
    } else {
      attend(i, row, c0, c1, thread, s);
    }
    barrier_.wait(thread);
  }

  void embed(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread) {
    const Buffer& b = p_.buffers[i.out];
    const Range part = share(std::max<int64_t>(c1 - c0, 0) * a_.batch, thread, threads_);
    for (int64_t m = part.begin; m < part.end; ++m) {
      int64_t code = token(m % a_.batch, row, c0 + m / a_.batch);
      if (code < 0 || code >= p_.codebook_size) code = 0;
      std::memcpy(at(b, row, c0) + m * b.stride, a_.weights + i.table + code * i.outputs, i.outputs * sizeof(float));
    }
  }

  // The code just before each position in raster order, from the end of the row above where need be; zeros before the first.
  void previous(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread) {
    const Buffer& b = p_.buffers[i.out];
    const Range part = share((c1 - c0) * a_.batch, thread, threads_);
    for (int64_t m = part.begin; m < part.end; ++m) {
      const int64_t before = row * a_.width + c0 + m / a_.batch - 1;
      float* out = at(b, row, c0) + m * b.stride;
      int64_t code = before < 0 ? 0 : token(m % a_.batch, before / a_.width, before % a_.width);
      if (code < 0 || code >= p_.codebook_size) code = 0;
      if (before < 0) std::fill(out, out + i.outputs, 0.0f);
      else std::memcpy(out, a_.weights + i.table + code * i.outputs, i.outputs * sizeof(float));
    }
  }

  void condition(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread) {
    const Buffer& b = p_.buffers[i.out];
    const Range part = share((c1 - c0) * a_.batch, thread, threads_);
    for (int64_t m = part.begin; m < part.end; ++m) {
      const int64_t place = ((m % a_.batch) * a_.height + row) * a_.width + c0 + m / a_.batch;
      std::memcpy(at(b, row, c0) + m * b.stride, a_.condition + place * p_.condition, p_.condition * sizeof(float));
    }
  }

  // The two halves of a panel as output ranges: 64 outputs in a row, or 32 and the 32 that gate them.
  struct Halves {
    int64_t offset[2], count[2];
  };
  static Halves halves(const Instruction& i, int64_t panel) {
    const bool gated = i.epilogue >= kGate;
    const int64_t limit = gated ? i.outputs / 2 : i.outputs;
    const int64_t first = gated ? panel * kHalf : panel * kWeightPanel;
    const int64_t second = gated ? limit + first : first + kHalf;
    const auto clip = [](int64_t n) { return std::clamp<int64_t>(n, 0, kHalf); };
    return {{first, second}, {clip(limit - first), clip((gated ? i.outputs : limit) - second)}};
  }

  void convolve(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread, Scratch& s) {
    const int64_t rows = (c1 - c0) * a_.batch, panels = Reader::panels(i);
    Range panel{0, panels}, part{0, rows};
    // Splitting the outputs lets each thread stream its own share of the weights; only few outputs and many rows split rows.
    if (panels % threads_ == 0 || rows < 12 * threads_) panel = share(panels, thread, threads_);
    else part = share(rows, thread, threads_);
    for (int64_t p = panel.begin; p < panel.end; ++p)
      for (int64_t m = part.begin; m < part.end; m += kRowChunk)
        convolve_chunk(i, row, c0, p, m, std::min(kRowChunk, part.end - m), s.acc.data());
  }

  void convolve_chunk(const Instruction& i, int64_t row, int64_t c0, int64_t panel, int64_t m, int64_t rows, float* acc) {
    const Halves h = halves(i, panel);
    start(i, row, c0, h, m, rows, acc);
    const float* w = a_.weights + i.weight + panel * i.depth * kWeightPanel;
    for (const Tap& tap : i.taps) {
      const Buffer& b = p_.buffers[tap.buffer];
      const float* in = at(b, row + tap.dy, c0 + tap.dx) + m * b.stride;
      for (int64_t c = 0; c < tap.channels; c += kWeightBlock) {
        const int64_t n = std::min(kWeightBlock, tap.channels - c);
        k_.chain(acc, in + c, b.stride, rows, w, n);
        w += n * kWeightPanel;
      }
    }
    for (int64_t r = 0; r < rows; ++r) finish(i, row, c0, h, m + r, acc + r * kWeightPanel);
  }

  // Where the chains begin: bias (+ class), or what an earlier instruction has summed.
  void start(const Instruction& i, int64_t row, int64_t c0, const Halves& h, int64_t m, int64_t rows, float* acc) {
    for (int64_t r = 0; r < rows; ++r) {
      float* out = acc + r * kWeightPanel;
      const float* from = i.init_kind == 0 ? a_.weights + i.init
                                           : at(p_.buffers[i.init], row, c0) + (m + r) * p_.buffers[i.init].stride;
      const int64_t label = i.classes >= 0 && a_.labels ? a_.labels[(m + r) % a_.batch] : -1;
      for (int half = 0; half < 2; ++half) {
        float* lane = out + half * kHalf;
        for (int64_t o = 0; o < h.count[half]; ++o) lane[o] = from[h.offset[half] + o];
        for (int64_t o = h.count[half]; o < kHalf; ++o) lane[o] = 0.0f;
        if (label < 0 || label >= p_.classes) continue;
        const float* extra = a_.weights + i.classes + label * i.outputs + h.offset[half];
        for (int64_t o = 0; o < h.count[half]; ++o) lane[o] = lane[o] + extra[o];
      }
    }
  }

  // What follows the chains of one position: raw copy, activation, residual, second copy with its own activation.
  void finish(const Instruction& i, int64_t row, int64_t c0, const Halves& h, int64_t m, float* acc) {
    const auto place = [&](int64_t buffer) { return at(p_.buffers[buffer], row, c0) + m * p_.buffers[buffer].stride; };
    if (i.raw >= 0)
      for (int half = 0; half < 2; ++half)
        std::memcpy(place(i.raw) + h.offset[half], acc + half * kHalf, h.count[half] * sizeof(float));
    if (i.out < 0) return;
    if (i.epilogue == kGate) k_.gate(acc, acc, acc + kHalf, kHalf);
    if (i.epilogue == kGlu) k_.glu(acc, acc, acc + kHalf, kHalf);
    if (i.epilogue == kElu) k_.elu(acc, acc, kWeightPanel);
    if (i.epilogue == kRelu) relu(acc, acc, kWeightPanel);
    for (int half = 0; half < (i.epilogue >= kGate ? 1 : 2); ++half) {
      float* value = acc + half * kHalf;
      const int64_t n = h.count[half], offset = h.offset[half];
      if (i.residual >= 0) {
        const float* residual = place(i.residual) + offset;
        for (int64_t o = 0; o < n; ++o) value[o] = value[o] + residual[o];
      }
      std::memcpy(place(i.out) + offset, value, n * sizeof(float));
      if (i.act >= 0 && i.act_kind == kElu) k_.elu(place(i.act) + offset, value, n);
      if (i.act >= 0 && i.act_kind == kRelu) relu(place(i.act) + offset, value, n);
    }
  }

  static void relu(float* out, const float* x, int64_t n) {
    for (int64_t o = 0; o < n; ++o) out[o] = x[o] > 0.0f ? x[o] : 0.0f;
  }

  // One thread owns a (head, image): it files the keys and values of the range, then attends from each of its positions to all t <= p.
  void attend(const Instruction& i, int64_t row, int64_t c0, int64_t c1, int thread, Scratch& s) {
    const int64_t steps = a_.height * a_.width, ldk = round_up(steps, 16), ldv = round_up(i.value, 16);
    const Range part = share(i.heads * a_.batch, thread, threads_);
    const auto rows = [&](int64_t buffer, int64_t m) { return at(p_.buffers[buffer], row, c0) + m * p_.buffers[buffer].stride; };
    for (int64_t item = part.begin; item < part.end; ++item) {
      const int64_t head = item % i.heads, image = item / i.heads;
      float* keys = a_.workspace + p_.buffers[i.cache].offset + item * (i.key * ldk + steps * ldv);
      float* values = keys + i.key * ldk;
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t t = row * a_.width + c, m = (c - c0) * a_.batch + image;
        for (int64_t d = 0; d < i.key; ++d) keys[d * ldk + t] = rows(i.k, m)[head * i.key + d];
        std::memcpy(values + t * ldv, rows(i.v, m) + head * i.value, i.value * sizeof(float));
        float* x = s.scores.data();
        k_.scores(x, rows(i.q, m) + head * i.key, keys, ldk, i.key, t + 1, a_.weights[i.scale]);
        float top = x[0];
        for (int64_t u = 1; u <= t; ++u) top = x[u] > top ? x[u] : top;
        const float sum = k_.softmax(x, top, t + 1);
        k_.mix(s.mixed.data(), x, values, ldv, ldv, t + 1, sum);
        std::memcpy(rows(i.out, m) + head * i.value, s.mixed.data(), i.value * sizeof(float));
      }
    }
  }

  const SampleArgs& a_;
  const SampleKernels& k_;
  const Program& p_;
  int threads_;  // changed by thread 0 only: before the others start to work, and once they are leaving
  std::atomic<bool> started_{false};
  std::atomic<bool> alone_{false};
  Barrier barrier_;
  std::vector<uint8_t> changed_;
  std::vector<Scratch> scratch_;  // by thread
  int64_t evaluated_ = 0;
};

}  // namespace

int64_t sample_workspace(const SampleArgs& args) { return Reader(args).read().workspace; }

int64_t sample_run(const SampleArgs& args, const SampleKernels& kernels) {
  const Program program = Reader(args).read();
  if (args.workspace_size < program.workspace)
    throw std::invalid_argument("sample: the workspace holds " + std::to_string(args.workspace_size) + " floats, the program needs " +
                                std::to_string(program.workspace) + ".");
  if (args.start < 0 || args.stop > args.height * args.width || args.start > args.stop)
    throw std::invalid_argument("sample: start and stop must satisfy 0 <= start <= stop <= height * width.");
  if (args.mode == kScore && (args.start % args.width || args.stop % args.width))
    throw std::invalid_argument("sample: scoring works on whole rows; start and stop must be multiples of the width.");
  return Engine(args, kernels, program).run();
}

}  // namespace vqfast
