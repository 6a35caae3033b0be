#include "server/choice_output.h"

#include <iterator>
#include <utility>

namespace kvarn {

ChoiceOutput::ChoiceOutput(int32_t choice, const Tokenizer& tokenizer, const OutputFormat& format,
                           OutputParser::State start, const OutputRules& rules)
    : choice_(choice),
      tokenizer_(&tokenizer),
      rules_(&rules),
      detokenizer_(tokenizer, rules.response.skip_special_tokens),
      stop_checker_(rules.stop, rules.include_stop_string),
      parser_(format, start) {}

void ChoiceOutput::record(const SampledToken& token, bool in_text) {
  ++num_tokens_;
  if (rules_->response.token_ids) ids_.push_back(token.token);
  if (!rules_->response.logprobs) return;
  TokenLogprobs entry;
  entry.token = {token.token, token.logprob, tokenizer_->token_bytes(token.token)};
  entry.in_text =
      in_text && !(rules_->response.skip_special_tokens && tokenizer_->is_special(token.token));
  for (const TokenLogprob& top : token.top_logprobs) {
    entry.top.push_back({top.token, top.logprob, tokenizer_->token_bytes(top.token)});
  }
  logprobs_.push_back(std::move(entry));
}

void ChoiceOutput::parse(const std::vector<TextPiece>& pieces) {
  for (const TextPiece& piece : pieces) parser_.push(piece, parsed_);
}

// `silent`: the token is counted but its text is not part of the answer.
std::optional<size_t> ChoiceOutput::push_text(int32_t token, bool silent) {
  const std::string text = silent ? std::string() : detokenizer_.push(token);
  if (num_tokens_ < rules_->min_tokens) {
    parse({{token, text, true}});
    return std::nullopt;
  }
  const StopChecker::Output out = stop_checker_.push(token, text);
  parse(out.pieces);
  return out.matched;
}

std::optional<size_t> ChoiceOutput::finish_text() {
  const StopChecker::Output out = stop_checker_.finish(detokenizer_.finish());
  parse(out.pieces);
  return out.matched;
}

void ChoiceOutput::push(const TokenEvent& event, std::vector<Delta>& deltas) {
  if (done()) return;
  const int32_t token = event.sampled.token;
  std::optional<size_t> matched;
  if (token >= 0) {
    // The token that ends generation is not part of the text unless the client wants to see it.
    const bool ending = event.finish == FinishReason::kStop && !rules_->include_stop_string;
    record(event.sampled, !ending);
    if (rules_->response.text) {
      matched = push_text(token, ending);
    } else {
      ++carried_tokens_;
    }
  }
  if (!matched.has_value() && event.finish.has_value() && rules_->response.text) {
    matched = finish_text();
  }
  if (matched.has_value()) {
    ended_by_stop_string_ = !event.finish.has_value();
    finish_ = Finish{FinishKind::kStop, {}, {}, stop_checker_.stop_string(*matched)};
  } else if (event.finish == FinishReason::kLength) {
    finish_ = Finish{FinishKind::kLength, {}, {}, {}};
  } else if (event.finish == FinishReason::kStop) {
    finish_ = Finish{};
    (event.finished_by_stop_id ? finish_->stop_token_id : finish_->eos_token_id) = token;
  }
  if (done()) parser_.finish(parsed_);
  release(deltas);
  if (done()) release_finish(deltas);
}

Delta ChoiceOutput::delta_of(DeltaKind kind, int32_t num_tokens) {
  Delta delta;
  delta.choice = choice_;
  delta.kind = kind;
  delta.num_tokens = num_tokens + std::exchange(carried_tokens_, 0);
  delta.num_reasoning_tokens = parser_.reasoning_tokens() - sent_reasoning_tokens_;
  sent_reasoning_tokens_ = parser_.reasoning_tokens();
  const auto take = [&](auto& from, auto& to) {
    const auto end = from.begin() + std::min<std::ptrdiff_t>(delta.num_tokens, std::ssize(from));
    to.assign(std::make_move_iterator(from.begin()), std::make_move_iterator(end));
    from.erase(from.begin(), end);
  };
  take(ids_, delta.token_ids);
  take(logprobs_, delta.logprobs);
  return delta;
}

void ChoiceOutput::release(std::vector<Delta>& deltas) {
  const ResponseOptions& response = rules_->response;
  for (OutputDelta& parsed : parsed_) {
    const bool reasoning = parsed.kind == OutputDelta::Kind::kReasoning;
    const bool hidden = reasoning && !response.include_reasoning;
    if (hidden) {
      carried_tokens_ += parsed.num_tokens;
      continue;
    }
    deltas.push_back(
        delta_of(reasoning ? DeltaKind::kReasoning : DeltaKind::kContent, parsed.num_tokens));
    deltas.back().text = std::move(parsed.text);
  }
  parsed_.clear();
  // Tokens without text of their own are shown at once where the client wants to see tokens.
  const bool shows_tokens = !response.text || response.token_ids || response.logprobs;
  if (carried_tokens_ > 0 && shows_tokens && !done()) {
    deltas.push_back(delta_of(DeltaKind::kContent, 0));
  }
}

void ChoiceOutput::release_finish(std::vector<Delta>& deltas) {
  Delta last = delta_of(DeltaKind::kFinish, parser_.unaccounted_tokens());
  last.finish = finish_;
  deltas.push_back(std::move(last));
}

}  // namespace kvarn
