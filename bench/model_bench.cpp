// A model with random weights on the CPU backend, without server and scheduler: prefill of 512
// tokens, decode of one and of eight sequences, decode at a context of 4096 with fp16 and with
// KVarN pages (docs/performance.md). Times are of Model::forward() and sampling; the tokens
// are random, the pages hold what a real prefill wrote.
//   kvarn_model_bench [--shape qwen3-0.6b | --model DIR] [--threads N] [--isa NAME]
//                     [--fp32-activations] [--only NAME] [--cpu-time] [--json]
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/core/arena.h"
#include "models/model.h"

namespace kvarn {
namespace {

// Seconds of the clock or, with --cpu-time, of this thread's processor time: with --threads 1 that
// is what a busy machine still measures well.
bool use_cpu_time = false;

double now() {
  timespec t{};
  clock_gettime(use_cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Figure {
  std::string name;
  double tokens_per_second;
};

// Several sequences of one length, driven in lockstep. Every block owns a fixed region of the pool:
// its exact pages, then one page for its record.
class Sequences {
 public:
  Sequences(Model& model, Backend& backend, KvFormat format, int count, int max_tokens,
            int max_rows)
      : model_(model),
        backend_(backend),
        layout_(make_kv_layout(format, model.config().head_dim)),
        count_(count),
        blocks_per_sequence_((max_tokens + kBlockTokens - 1) / kBlockTokens),
        arena_(backend.allocate(model.workspace_bytes(max_rows, count))),
        logits_(static_cast<size_t>(count) * static_cast<size_t>(model.config().vocab_size)) {
    const ModelConfig& config = model.config();
    const int64_t pages = int64_t{count} * blocks_per_sequence_ * region();
    const size_t layer_bytes =
        static_cast<size_t>(pages * config.num_kv_heads) * static_cast<size_t>(layout_.page_bytes);
    pool_ = backend.allocate(layer_bytes * static_cast<size_t>(config.num_layers));
    for (int layer = 0; layer < config.num_layers; ++layer) {
      layers_.push_back({pool_.data() + static_cast<size_t>(layer) * layer_bytes, pages,
                         config.num_kv_heads, layout_});
    }
    table_.resize(static_cast<size_t>(count) * static_cast<size_t>(blocks_per_sequence_));
    for (BlockPages& pages_of_block : table_) pages_of_block.fill(-1);
  }

  // One chunk of sequence `s`, from its length to length + tokens.
  double prefill(int s, int tokens) {
    begin_step();
    for (int i = 0; i < tokens; ++i) {
      const int position = length_ + i, block = position / kBlockTokens;
      const bool coded =
          layout_.coded() && block >= kSinkBlocks && kBlockTokens * (block + 1) <= length_ + tokens;
      if (coded && position % kBlockTokens == 0) {
        EncodeTile tile{.first_row = i, .source_pages = {}, .target_page = record_page(s, block)};
        tile.source_pages.fill(-1);
        encode_in_layer_.push_back(tile);
        pages(s, block).fill(-1);
        pages(s, block)[0] = tile.target_page;
      }
      add_row(s, position, coded);
    }
    sequences_.push_back({0, tokens, length_, s * blocks_per_sequence_});
    logit_rows_ = {tokens - 1};
    return run(0);
  }

  void set_length(int length) { length_ = length; }

  // One token of every sequence.
  double decode() {
    begin_step();
    const int full = length_ / kBlockTokens - 1;
    const bool crossing = layout_.coded() && length_ % kBlockTokens == 0 && full >= kSinkBlocks;
    for (int s = 0; s < count_; ++s) {
      if (crossing && pages(s, full)[0] != record_page(s, full)) {
        encode_before_.push_back({-1, pages(s, full), record_page(s, full)});
        pages(s, full).fill(-1);
        pages(s, full)[0] = record_page(s, full);
      }
      sequences_.push_back({s, 1, length_, s * blocks_per_sequence_});
      add_row(s, length_, false);
      logit_rows_.push_back(s);
    }
    const double seconds = run(count_);
    ++length_;
    return seconds;
  }

 private:
  int region() const { return layout_.pages_per_exact_block + 1; }
  int32_t first_page(int s, int block) const {
    return static_cast<int32_t>((s * blocks_per_sequence_ + block) * region());
  }
  int32_t record_page(int s, int block) const {
    return first_page(s, block) + layout_.pages_per_exact_block;
  }
  BlockPages& pages(int s, int block) {
    return table_[static_cast<size_t>(s * blocks_per_sequence_ + block)];
  }

  void begin_step() {
    token_ids_.clear();
    positions_.clear();
    slots_.clear();
    sequences_.clear();
    encode_before_.clear();
    encode_in_layer_.clear();
    logit_rows_.clear();
  }

  void add_row(int s, int position, bool coded) {
    const int block = position / kBlockTokens, row = position % kBlockTokens;
    token_ids_.push_back(
        static_cast<int32_t>(random_() % static_cast<uint64_t>(model_.config().vocab_size)));
    positions_.push_back(position);
    if (coded) {
      slots_.push_back(-1);
      return;
    }
    const int32_t page = first_page(s, block) + row / layout_.exact_rows;
    pages(s, block)[static_cast<size_t>(row / layout_.exact_rows)] = page;
    slots_.push_back(int64_t{page} * layout_.exact_rows + row % layout_.exact_rows);
  }

  double run(int decodes) {
    arena_.reset();
    const int64_t rows = static_cast<int64_t>(logit_rows_.size());
    const Tensor logits = Tensor::of(logits_.data(), {rows, model_.config().vocab_size});
    std::vector<SamplingRow> sampling(logit_rows_.size());
    for (SamplingRow& row : sampling) row.temperature = 0.f;
    std::vector<SampledToken> sampled(logit_rows_.size());
    StepInput input;
    input.token_ids = token_ids_;
    input.positions = positions_;
    input.slots = slots_;
    input.sequences = sequences_;
    input.num_decode_sequences = decodes;
    input.block_pages = table_;
    input.encode_before = encode_before_;
    input.encode_in_layer = encode_in_layer_;
    input.logit_rows = logit_rows_;
    const double start = now();
    model_.forward(backend_.begin_step(input, sampling), {layers_, layout_}, arena_, logits,
                   nullptr);
    backend_.sample(logits);
    backend_.end_step(sampled);
    const double seconds = now() - start;
    for (const SampledToken& token : sampled) {
      CHECK(!token.non_finite, "the model gave logits that are no numbers");
    }
    return seconds;
  }

  Model& model_;
  Backend& backend_;
  KvLayout layout_;
  int count_, blocks_per_sequence_;
  Arena arena_;
  std::vector<float> logits_;
  Buffer pool_;
  std::vector<KvLayerView> layers_;
  std::vector<BlockPages> table_;
  int length_ = 0;
  std::mt19937_64 random_{7};

  std::vector<int32_t> token_ids_, positions_;
  std::vector<int64_t> slots_;
  std::vector<AttentionSequence> sequences_;
  std::vector<EncodeTile> encode_before_, encode_in_layer_;
  std::vector<int32_t> logit_rows_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

constexpr int kChunk = 512, kShortPrompt = 128, kLongPrompt = 4096;

double bench_prefill(Model& model, Backend& backend) {
  std::vector<double> seconds;
  Sequences sequences(model, backend, KvFormat::kKvarnK4V2, 1, kChunk, kChunk);
  for (int i = 0; i < 4; ++i) seconds.push_back(sequences.prefill(0, kChunk));
  seconds.erase(seconds.begin());  // touches fresh memory
  return kChunk / median(seconds);
}

double bench_decode(Model& model, Backend& backend, KvFormat format, int count, int prompt,
                    int steps) {
  Sequences sequences(model, backend, format, count, prompt + steps + 1, kChunk);
  for (int at = 0; at < prompt; at += kChunk) {
    sequences.set_length(at);
    for (int s = 0; s < count; ++s) sequences.prefill(s, std::min(kChunk, prompt - at));
  }
  sequences.set_length(prompt);
  std::vector<double> seconds;
  for (int i = 0; i < steps; ++i) seconds.push_back(sequences.decode());
  return count / median(seconds);
}

int run(int argc, char** argv) {
  CpuOptions options;
  ModelSource source;
  source.format = LoadFormat::kDummy;
  source.shape = "qwen3-0.6b";
  source.max_model_len = 8192;
  std::string only;
  bool json = false;
  for (int i = 1; i < argc; ++i) {
    const auto value = [&]() -> std::string { return i + 1 < argc ? argv[++i] : ""; };
    const std::string flag = argv[i];
    if (flag == "--threads") {
      options.threads = std::atoi(value().c_str());
    } else if (flag == "--shape") {
      source.shape = value();
    } else if (flag == "--model") {
      source.path = value();
      source.format = LoadFormat::kAuto;
      source.shape.clear();
    } else if (flag == "--fp32-activations") {
      options.fp32_activations = true;
    } else if (flag == "--cpu-time") {
      use_cpu_time = true;
    } else if (flag == "--only") {
      only = value();
    } else if (flag == "--json") {
      json = true;
    } else if (flag == "--isa") {
      const std::string name = value();
      bool found = false;
      for (int isa = 0; isa <= static_cast<int>(best_cpu_isa()); ++isa) {
        if (name != cpu_isa_name(static_cast<CpuIsa>(isa))) continue;
        options.isa = static_cast<CpuIsa>(isa);
        found = true;
      }
      if (!found) {
        std::fprintf(stderr, "--isa %s: unknown or not on this processor (best: %s)\n",
                     name.c_str(), cpu_isa_name(best_cpu_isa()));
        return 2;
      }
    } else {
      std::fprintf(stderr,
                   "usage: %s [--shape qwen3-0.6b | --model DIR] [--threads N] [--isa NAME] "
                   "[--fp32-activations] [--only NAME] [--cpu-time] [--json]\n",
                   argv[0]);
      return 2;
    }
  }
  const auto backend = make_cpu_backend(options);
  auto loaded = load_model(source, *backend);
  if (!loaded) {
    std::fprintf(stderr, "%s\n", loaded.status().message().c_str());
    return 1;
  }
  Model& model = **loaded;

  const std::vector<std::pair<std::string, std::function<double()>>> benches = {
      {"prefill-512", [&] { return bench_prefill(model, *backend); }},
      {"decode-b1",
       [&] { return bench_decode(model, *backend, KvFormat::kKvarnK4V2, 1, kShortPrompt, 32); }},
      {"decode-b8",
       [&] { return bench_decode(model, *backend, KvFormat::kKvarnK4V2, 8, kShortPrompt, 24); }},
      {"decode-4k-fp16",
       [&] { return bench_decode(model, *backend, KvFormat::kFp16, 1, kLongPrompt, 24); }},
      {"decode-4k-kvarn",
       [&] { return bench_decode(model, *backend, KvFormat::kKvarnK4V2, 1, kLongPrompt, 24); }},
  };
  std::vector<Figure> results;
  for (const auto& [name, bench] : benches) {
    if (!only.empty() && only != name) continue;
    results.push_back({name, bench()});
    if (!json)
      std::printf("%-18s %9.2f tokens/s\n", name.c_str(), results.back().tokens_per_second);
    std::fflush(stdout);
  }
  if (json) {
    std::printf("{\"backend\": \"%s\", \"shape\": \"%s\", \"tokens_per_second\": {",
                backend->name().c_str(), source.shape.c_str());
    for (size_t i = 0; i < results.size(); ++i) {
      std::printf("%s\"%s\": %.3f", i == 0 ? "" : ", ", results[i].name.c_str(),
                  results[i].tokens_per_second);
    }
    std::printf("}}\n");
  }
  return 0;
}

}  // namespace
}  // namespace kvarn

int main(int argc, char** argv) { return kvarn::run(argc, argv); }
