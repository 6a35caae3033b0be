#include "server/commands/needles.h"

#include <algorithm>
#include <fstream>
#include <random>
#include <set>
#include <sstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace kvarn::commands {
namespace {

using Json = nlohmann::json;

Result<std::string> read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return Status::invalid_argument(fmt::format("cannot read {}", path.string()));
  }
  return text.str();
}

std::string replace_all(std::string text, const std::string& what, const std::string& with) {
  for (size_t at = text.find(what); at != std::string::npos;
       at = text.find(what, at + with.size())) {
    text.replace(at, what.size(), with);
  }
  return text;
}

// std::uniform_int_distribution differs between libraries; receipts must not.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  size_t below(size_t n) { return static_cast<size_t>(engine_() % n); }

 private:
  std::mt19937_64 engine_;
};

struct Fact {
  std::string adjective, place, code;
  std::string fill(const std::string& pattern) const {
    return replace_all(
        replace_all(replace_all(pattern, "{adjective}", adjective), "{place}", place), "{code}",
        code);
  }
};

Fact draw_fact(const NeedlePatterns& patterns, Random& random, std::set<std::string>& used) {
  const auto draw = [&](const std::vector<std::string>& words) {
    std::string word;
    do {
      word = words[random.below(words.size())];
    } while (!used.insert(word).second);
    return word;
  };
  Fact fact{draw(patterns.adjectives), draw(patterns.places), {}};
  do {
    fact.code.clear();
    for (int i = 0; i < patterns.code_digits; ++i) {
      fact.code += static_cast<char>('0' + (i == 0 ? 1 + random.below(9) : random.below(10)));
    }
  } while (!used.insert(fact.code).second);
  return fact;
}

// The border of the first `count` sentences that is nearest to `depth` of their text, by
// characters.
size_t border_at(const std::vector<Sentence>& filler, size_t first, size_t count, double depth) {
  size_t total = 0;
  for (size_t i = 0; i < count; ++i) total += filler[(first + i) % filler.size()].text.size();
  const double wanted = depth * static_cast<double>(total);
  double before = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto size = static_cast<double>(filler[(first + i) % filler.size()].text.size());
    if (before + size / 2 >= wanted) return i;
    before += size;
  }
  return count;
}

// How many sentences hold `characters`.
size_t sentences_of(const std::vector<Sentence>& filler, size_t first, size_t characters) {
  size_t count = 0;
  for (size_t seen = 0; seen < characters; ++count) {
    seen += filler[(first + count) % filler.size()].text.size() + 1;
  }
  return count;
}

// Borders are numbered: border i is before sentence i. Facts go in as sentences of their own.
std::string join(const std::vector<Sentence>& filler, size_t first, size_t count,
                 const std::vector<std::pair<size_t, std::string>>& facts) {
  std::string text;
  const auto append = [&](const std::string& sentence, bool paragraph) {
    if (!text.empty()) text += paragraph ? "\n\n" : " ";
    text += sentence;
  };
  for (size_t i = 0; i <= count; ++i) {
    for (const auto& [border, fact] : facts) {
      if (border == i) append(fact, false);
    }
    if (i == count) break;
    const Sentence& sentence = filler[(first + i) % filler.size()];
    append(sentence.text, sentence.starts_paragraph);
  }
  return text;
}

}  // namespace

Result<NeedlePatterns> load_needles(const std::filesystem::path& needles_json) {
  KVARN_ASSIGN_OR_RETURN(const std::string text, read_text(needles_json));
  NeedlePatterns patterns;
  std::string filler;
  try {
    const Json json = Json::parse(text);
    json.at("sentence").get_to(patterns.sentence);
    json.at("question").get_to(patterns.question);
    json.at("prompt").get_to(patterns.prompt);
    json.at("adjectives").get_to(patterns.adjectives);
    json.at("places").get_to(patterns.places);
    json.at("code_digits").get_to(patterns.code_digits);
    json.at("distractors").get_to(patterns.distractors);
    json.at("max_new_tokens").get_to(patterns.max_new_tokens);
    json.at("enable_thinking").get_to(patterns.enable_thinking);
    json.at("filler").get_to(filler);
  } catch (const Json::exception& error) {  // its text names the key and the type
    return Status::invalid_argument(
        fmt::format("{} is not a needle file: {}", needles_json.string(), error.what()));
  }
  const auto needed = static_cast<size_t>(std::max(patterns.distractors, 0)) + 1;
  if (std::set(patterns.adjectives.begin(), patterns.adjectives.end()).size() < needed ||
      std::set(patterns.places.begin(), patterns.places.end()).size() < needed ||
      patterns.distractors < 0 || patterns.code_digits < 2 || patterns.code_digits > 18 ||
      patterns.max_new_tokens < 1) {
    return Status::invalid_argument(
        fmt::format("{}: needs at least {} different adjectives and places (distractors + 1), "
                    "code_digits 2..18 "
                    "and max_new_tokens of at least 1",
                    needles_json.string(), needed));
  }
  if (filler.empty() || filler.find('/') != std::string::npos) {
    return Status::invalid_argument(
        fmt::format("{}: filler must name a file beside it", needles_json.string()));
  }
  KVARN_ASSIGN_OR_RETURN(patterns.filler_text, read_text(needles_json.parent_path() / filler));
  return patterns;
}

std::vector<Sentence> split_sentences(const std::string& text) {
  std::vector<Sentence> sentences;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    bool starts_paragraph = true;
    for (size_t begin = 0; begin < line.size();) {
      size_t end = begin;
      while (end < line.size()) {
        const char c = line[end++];
        const bool stop = c == '.' || c == '!' || c == '?';
        if (stop && end + 1 < line.size() && line[end] == ' ' && line[end + 1] >= 'A' &&
            line[end + 1] <= 'Z') {
          break;
        }
      }
      sentences.push_back({line.substr(begin, end - begin), starts_paragraph});
      starts_paragraph = false;
      begin = end + 1;  // past the space
    }
  }
  return sentences;
}

Result<NeedleCase> make_needle_case(const NeedlePatterns& patterns,
                                    const std::vector<Sentence>& filler, const RenderPrompt& render,
                                    int tokens, int index, int count, uint64_t seed) {
  if (filler.empty()) return Status::invalid_argument("the filler holds no sentence");
  std::seed_seq sequence{seed, static_cast<uint64_t>(tokens), static_cast<uint64_t>(index)};
  std::vector<uint32_t> words(2);
  sequence.generate(words.begin(), words.end());
  Random random((uint64_t{words[0]} << 32) | words[1]);

  std::set<std::string> used;
  const Fact needle = draw_fact(patterns, random, used);
  std::vector<Fact> distractors;
  for (int i = 0; i < patterns.distractors; ++i) {
    distractors.push_back(draw_fact(patterns, random, used));
  }
  const size_t first = random.below(filler.size());
  std::vector<size_t> places;  // of the distractors, as parts of 2^32
  for (size_t i = 0; i < distractors.size(); ++i) places.push_back(random.below(size_t{1} << 32));

  NeedleCase result;
  result.depth = count > 1 ? static_cast<double>(index) / (count - 1) : 0.5;
  result.code = needle.code;
  const auto prompt_of = [&](size_t sentences) {
    std::vector<std::pair<size_t, std::string>> facts;
    facts.emplace_back(border_at(filler, first, sentences, result.depth),
                       needle.fill(patterns.sentence));
    for (size_t i = 0; i < distractors.size(); ++i) {
      facts.emplace_back(places[i] * (sentences + 1) >> 32, distractors[i].fill(patterns.sentence));
    }
    const std::string message =
        replace_all(replace_all(patterns.prompt, "{text}", join(filler, first, sentences, facts)),
                    "{question}", needle.fill(patterns.question));
    return render(message);
  };

  // The most sentences that fit, by bisection: more sentences never take fewer tokens.
  constexpr size_t kMostCharactersPerToken = 8;  // of prose, on average over a whole text
  size_t low = 0;
  size_t high = sentences_of(filler, first, static_cast<size_t>(tokens) * kMostCharactersPerToken);
  while (low < high) {
    const size_t middle = low + (high - low + 1) / 2;
    KVARN_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, prompt_of(middle));
    if (prompt.size() <= static_cast<size_t>(tokens)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  KVARN_ASSIGN_OR_RETURN(result.prompt, prompt_of(low));
  if (result.prompt.size() > static_cast<size_t>(tokens)) {
    return Status::invalid_argument(fmt::format(
        "a needle case takes at least {} tokens; {} are too few", result.prompt.size(), tokens));
  }
  return result;
}

}  // namespace kvarn::commands
