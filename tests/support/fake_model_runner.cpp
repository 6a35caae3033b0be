#include "tests/support/fake_model_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <thread>
#include <utility>

namespace kvarn::test {
namespace {

constexpr uint64_t kEmptyPrefix = 0x1234567;
constexpr size_t kMaxViolations = 20;  // the first few tell the story

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdu;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53u;
  return x ^ (x >> 33);
}
uint64_t extend(uint64_t hash, int32_t token) {
  return mix(hash * 31 + static_cast<uint32_t>(token) + 1);
}
int32_t default_next_token(uint64_t hash, uint64_t seed, uint32_t choice, int vocab_size) {
  return static_cast<int32_t>(mix(hash ^ mix(seed * 131 + choice)) %
                              static_cast<uint64_t>(vocab_size));
}

}  // namespace

uint64_t fake_prefix_hash(std::span<const int32_t> tokens) {
  uint64_t hash = kEmptyPrefix;
  for (const int32_t token : tokens) hash = extend(hash, token);
  return hash;
}

int32_t fake_next_token(std::span<const int32_t> tokens, uint64_t seed, uint32_t choice,
                        int vocab_size) {
  return default_next_token(fake_prefix_hash(tokens), seed, choice, vocab_size);
}

FakeModelRunner::FakeModelRunner(FakeRunnerOptions options)
    : options_(std::move(options)),
      layout_(make_kv_layout(options_.format, kCodedHeadDim)),
      pages_(static_cast<size_t>(options_.num_pages)) {
  for (Page& page : pages_) page.rows.resize(static_cast<size_t>(layout_.exact_rows));
  progress_.store(std::chrono::steady_clock::now());
}

std::future<StepResult> FakeModelRunner::run(const StepBatch& batch) {
  if (options_.step_time.count() > 0) {
    return std::async(std::launch::async, [this, &batch] {
      std::this_thread::sleep_for(options_.step_time);
      return step(batch);
    });
  }
  std::promise<StepResult> promise;
  try {
    promise.set_value(step(batch));
  } catch (...) {
    promise.set_exception(std::current_exception());
  }
  return promise.get_future();
}

StepResult FakeModelRunner::step(const StepBatch& batch) {
  const int64_t index = steps_++;
  if (options_.before_step) options_.before_step(index, batch);
  rows_ += batch.num_rows();
  max_rows_ = std::max(max_rows_, batch.num_rows());
  if (batch.num_rows() == 0) ++encode_only_steps_;
  check_shapes(batch);
  check_owners(batch);
  encode_from_pages(batch);
  write_rows(batch);
  std::vector<uint64_t> row_hash(static_cast<size_t>(batch.num_rows()));
  for (size_t i = 0; i < batch.sequences.size(); ++i) read_sequence(batch, i, row_hash);

  StepResult result;
  for (size_t i = 0; i < batch.sampling.size(); ++i) {
    const SamplingRow& row = batch.sampling[i];
    const uint64_t hash = row_hash[static_cast<size_t>(batch.logit_rows[i])];
    SampledToken token;
    token.token = options_.next_token
                      ? options_.next_token(hash, row)
                      : default_next_token(hash, row.seed, row.choice, options_.vocab_size);
    if (row.num_logprobs >= 0) token.logprob = -1.f / static_cast<float>(1 + hash % 97);
    for (int32_t k = 0; k < row.num_logprobs; ++k)
      token.top_logprobs.push_back({k, -1.f - 0.1f * static_cast<float>(k)});
    const auto banned = [&] {
      return std::find(row.banned.begin(), row.banned.end(), token.token) != row.banned.end();
    };
    while (banned()) token.token = (token.token + 1) % options_.vocab_size;
    result.tokens.push_back(std::move(token));
  }
  progress_.store(std::chrono::steady_clock::now());
  return result;
}

void FakeModelRunner::check_shapes(const StepBatch& batch) {
  const auto rows = static_cast<size_t>(batch.num_rows());
  if (batch.positions.size() != rows || batch.slots.size() != rows)
    violation("arrays differ in size");
  if (batch.logit_rows.size() != batch.sampling.size())
    violation("logit rows without sampling rows");
  if (!std::is_sorted(batch.logit_rows.begin(), batch.logit_rows.end()))
    violation("logit rows descend");
  int32_t next_row = 0;
  size_t next_block = 0;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const AttentionSequence& s = batch.sequences[i];
    if (s.first_row != next_row) violation("rows of sequences are not contiguous");
    if (s.num_rows < 1) violation("a sequence without rows");
    if (static_cast<int>(i) < batch.num_decode_sequences && s.num_rows != 1)
      violation("a decode of several rows");
    if (s.num_rows > 1 && s.first_position % kBlockTokens != 0)
      violation("a chunk starts inside a block");
    if (static_cast<size_t>(s.first_block) != next_block)
      violation("block tables are not contiguous");
    const int32_t last = s.first_position + s.num_rows - 1;
    next_row += s.num_rows;
    next_block += static_cast<size_t>(last / kBlockTokens + 1);
    for (int32_t r = 0; r < s.num_rows; ++r) {
      if (batch.positions[static_cast<size_t>(s.first_row + r)] != s.first_position + r)
        violation("positions have gaps");
    }
  }
  if (static_cast<size_t>(next_row) != rows) violation("rows that belong to no sequence");
  if (next_block != batch.block_pages.size())
    violation("a block table of another length than its sequence");
  for (const int32_t token : batch.token_ids) {
    if (token < 0 || token >= options_.vocab_size) violation("a token outside the vocabulary");
  }
}

// Pages that this step writes belong to one sequence, and no page is read both coded and exact.
void FakeModelRunner::check_owners(const StepBatch& batch) {
  std::map<int32_t, size_t> written;  // page -> sequence
  std::set<int64_t> slots;
  std::map<int32_t, bool> coded_page;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const AttentionSequence& s = batch.sequences[i];
    for (int32_t r = s.first_row; r < s.first_row + s.num_rows; ++r) {
      const int64_t slot = batch.slots[static_cast<size_t>(r)];
      if (slot < 0) continue;
      if (!slots.insert(slot).second) violation("two rows in one slot");
      const auto page = static_cast<int32_t>(slot / layout_.exact_rows);
      if (written.emplace(page, i).first->second != i) violation("two sequences write one page");
    }
    for (const EncodeTile& tile : batch.encode_in_layer) {
      if (tile.first_row < s.first_row || tile.first_row >= s.first_row + s.num_rows) continue;
      if (!written.emplace(tile.target_page, i).second) violation("a record over another write");
      if (tile.first_row + kBlockTokens > s.first_row + s.num_rows)
        violation("a tile beyond its chunk");
    }
  }
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const AttentionSequence& s = batch.sequences[i];
    const int32_t num_blocks = (s.first_position + s.num_rows - 1) / kBlockTokens + 1;
    for (int32_t k = 0; k < num_blocks; ++k) {
      const BlockPages& pages = batch.block_pages[static_cast<size_t>(s.first_block + k)];
      const bool coded = layout_.coded() && k >= kSinkBlocks && pages[1] < 0;
      for (const int32_t page : pages) {
        if (page < 0) continue;
        // A one-page exact tail looks coded here; its own rows are checked when it is read.
        const bool tail = k + 1 == num_blocks;
        if (!tail && coded_page.emplace(page, coded).first->second != coded)
          violation("a page both coded and exact");
        const auto it = written.find(page);
        if (it != written.end() && it->second != i)
          violation(fmt::format("page {} is written by one sequence and read by another", page));
      }
    }
  }
}

void FakeModelRunner::encode_from_pages(const StepBatch& batch) {
  std::set<int32_t> sources, targets;
  std::vector<std::pair<int32_t, Page>> records;
  for (const EncodeTile& tile : batch.encode_before) {
    if (tile.first_row >= 0) violation("encode_before from rows");
    for (int n = 0; n < layout_.pages_per_exact_block; ++n) {
      if (!sources.insert(tile.source_pages[static_cast<size_t>(n)]).second)
        violation("a page encoded twice");
    }
    if (!targets.insert(tile.target_page).second) violation("two records in one page");
    const Page* const first = page_at(tile.source_pages[0], "encode source");
    if (first == nullptr) continue;
    const int32_t position = first->rows[0].position;
    if (position < 0 || position % kBlockTokens != 0) {
      violation(
          fmt::format("encode of page {} which holds position {}", tile.source_pages[0], position));
      continue;
    }
    Page record = *first;
    record.coded = true;
    record.block = position / kBlockTokens;
    record.before = first->rows[0].before;
    record.hash =
        read_block(tile.source_pages, record.block, false, kBlockTokens, record.before, "encode");
    records.emplace_back(tile.target_page, std::move(record));
  }
  for (const int32_t target : targets) {
    if (sources.count(target) != 0) violation("a record over the source of another, in any order");
  }
  for (auto& [target, record] : records) {
    if (Page* const page = page_at(target, "encode target")) *page = std::move(record);
  }
  // Sources are free from here on: whoever reads them before they are written again is wrong.
  for (const int32_t source : sources) {
    Page* const page = page_at(source, "encode source");
    if (page == nullptr) continue;
    *page = Page{};
    page->rows.resize(static_cast<size_t>(layout_.exact_rows));
  }
}

void FakeModelRunner::write_rows(const StepBatch& batch) {
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const AttentionSequence& s = batch.sequences[i];
    const std::string who = fmt::format("sequence {}", i);
    // The prefix before the chunk, as the pages say.
    uint64_t hash = kEmptyPrefix;
    if (s.first_position > 0) {
      const int32_t before = s.first_position - 1;
      const BlockPages& pages =
          batch.block_pages[static_cast<size_t>(s.first_block + before / kBlockTokens)];
      const int32_t in_block = before % kBlockTokens;
      const bool coded =
          layout_.coded() && reads_coded(before / kBlockTokens, s.first_position, s.first_position);
      const Page* const page = page_at(
          coded ? pages[0] : pages[static_cast<size_t>(in_block / layout_.exact_rows)], who);
      if (page != nullptr)
        hash = coded ? page->hash
                     : page->rows[static_cast<size_t>(in_block % layout_.exact_rows)].hash;
    }
    std::vector<uint64_t> hashes{hash};
    for (int32_t r = s.first_row; r < s.first_row + s.num_rows; ++r) {
      const uint64_t before = hash;
      hash = extend(hash, batch.token_ids[static_cast<size_t>(r)]);
      hashes.push_back(hash);
      const int64_t slot = batch.slots[static_cast<size_t>(r)];
      if (slot < 0) continue;
      Page* const page = page_at(static_cast<int32_t>(slot / layout_.exact_rows), who);
      if (page == nullptr) continue;
      if (page->coded) {  // freed and taken again
        page->coded = false;
        std::fill(page->rows.begin(), page->rows.end(), StoredRow{});
      }
      page->rows[static_cast<size_t>(slot % layout_.exact_rows)] = {
          before, hash, batch.positions[static_cast<size_t>(r)]};
    }
    for (const EncodeTile& tile : batch.encode_in_layer) {
      const int32_t offset = tile.first_row - s.first_row;
      if (offset < 0 || offset + kBlockTokens > s.num_rows) continue;
      if (offset % kBlockTokens != 0) violation("a tile off the block border");
      Page* const page = page_at(tile.target_page, who);
      if (page == nullptr) continue;
      page->coded = true;
      page->block = (s.first_position + offset) / kBlockTokens;
      page->before = hashes[static_cast<size_t>(offset)];
      page->hash = hashes[static_cast<size_t>(offset + kBlockTokens)];
    }
  }
}

void FakeModelRunner::read_sequence(const StepBatch& batch, size_t index,
                                    std::vector<uint64_t>& row_hash) {
  const AttentionSequence& s = batch.sequences[index];
  const std::string who = fmt::format("step {} sequence {} of {} rows from position {}", steps_,
                                      index, s.num_rows, s.first_position);
  const int32_t end = s.first_position + s.num_rows;
  uint64_t hash = kEmptyPrefix;
  for (int32_t block = 0; block * kBlockTokens < end; ++block) {
    const BlockPages& pages = batch.block_pages[static_cast<size_t>(s.first_block + block)];
    const int32_t first = block * kBlockTokens;
    const int32_t stored = std::min(end, first + kBlockTokens) - first;
    // The last query of the step reads most blocks coded; a chunk's own last tile is not read from
    // pages, but what it left there is what later steps read.
    const bool complete = stored == kBlockTokens &&
                          (end > first + kBlockTokens ||
                           batch.slots[static_cast<size_t>(s.first_row + s.num_rows - 1)] < 0);
    const bool coded = layout_.coded() && block >= kSinkBlocks && complete;
    const uint64_t before = hash;
    hash = read_block(pages, block, coded, stored, before, who);
    // Rows of this step: their hashes by their tokens, from the block's verified start.
    uint64_t running = before;
    for (int32_t p = std::max(first, s.first_position); p < first + stored; ++p) {
      if (p == s.first_position && p > first) {
        const Page* const page =
            page_at(pages[static_cast<size_t>((p - 1 - first) / layout_.exact_rows)], who);
        if (page != nullptr)
          running = page->rows[static_cast<size_t>((p - 1 - first) % layout_.exact_rows)].hash;
      }
      const auto row = static_cast<size_t>(s.first_row + p - s.first_position);
      running = extend(running, batch.token_ids[row]);
      row_hash[row] = running;
    }
    if (first + stored == end && running != hash) violation(who + ": rows and pages disagree");
  }
  if (layout_.coded()) {
    for (int32_t p = s.first_position; p < end; ++p) {
      for (int32_t block = 0; block <= p / kBlockTokens; ++block)
        coded_reads_ += reads_coded(block, p, p) ? 1 : 0;
    }
  }
}

uint64_t FakeModelRunner::read_block(const BlockPages& pages, int32_t block, bool coded,
                                     int32_t num_rows, uint64_t before, const std::string& who) {
  const auto complain = [&](const std::string& what) {
    violation(fmt::format("{}: block {} {}", who, block, what));
  };
  if (coded) {
    for (size_t n = 1; n < pages.size(); ++n) {
      if (pages[n] >= 0) complain("is coded and has several pages");
    }
    const Page* const page = page_at(pages[0], who);
    if (page == nullptr) return before;
    if (!page->coded) {
      complain(fmt::format("is read coded, page {} holds exact rows", pages[0]));
    } else if (page->block != block || page->before != before) {
      complain(fmt::format("is read from page {} which holds block {} of another prefix", pages[0],
                           page->block));
    }
    return page->hash;
  }
  uint64_t hash = before;
  for (int32_t r = 0; r < num_rows; ++r) {
    const int32_t id = pages[static_cast<size_t>(r / layout_.exact_rows)];
    const Page* const page = page_at(id, who);
    if (page == nullptr) return hash;
    const StoredRow& row = page->rows[static_cast<size_t>(r % layout_.exact_rows)];
    if (page->coded) {
      complain(fmt::format("is read exact, page {} is coded", id));
      return hash;
    }
    if (row.position != block * kBlockTokens + r || row.before != hash) {
      complain(fmt::format("row {} of page {} holds position {} of another prefix", r, id,
                           row.position));
      return row.hash;
    }
    hash = row.hash;
  }
  return hash;
}

FakeModelRunner::Page* FakeModelRunner::page_at(int32_t id, const std::string& who) {
  if (id >= 0 && id < options_.num_pages) return &pages_[static_cast<size_t>(id)];
  violation(fmt::format("{}: page {} outside the pool", who, id));
  return nullptr;
}

void FakeModelRunner::violation(const std::string& what) {
  if (violations_.size() < kMaxViolations)
    violations_.push_back(fmt::format("step {}: {}", steps_, what));
}

}  // namespace kvarn::test
