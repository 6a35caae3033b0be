// `kvarn chat`: a conversation in the terminal, with a model in this process or with a server.
// Replies go to stdout as they come; everything else to stderr, so that a pipe carries answers
// only.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>

#include <fmt/format.h>

#include "kernels/core/log.h"
#include "server/commands/chat_peer.h"
#include "server/commands/commands.h"

namespace kvarn::commands {
namespace {

const CommandSpec kChat = {
    "chat",
    "Talks to a model: in this process (--model) or at a server (--url). Each line is a message; "
    "the conversation so far goes with it. /help lists what else can be typed. Ctrl-C ends a "
    "reply, a second one the program. Works in pipes: every input line gets one reply.",
    "  kvarn chat --model DIR\n"
    "  kvarn chat --url http://127.0.0.1:8000\n"
    "  echo 'What is 2 + 2?' | kvarn chat --model DIR --temperature 0\n"
    "  kvarn chat --model DIR --system 'Answer in one sentence.' --no-thinking\n"};

struct ChatOptions {
  std::string url;
  std::string system;
  std::string served_model;
  double temperature = -1;
  int max_tokens = 0;
  bool thinking = true;
  bool show_reasoning = true;

  static void visit(auto& self, auto&& field) {
    field("url", self.url,
          "talk to this server, as http://127.0.0.1:8000, instead of loading a model");
    field("system", self.system, "system message of the conversation");
    field("served-model", self.served_model, "name of the model to ask the server for");
    field("temperature", self.temperature, "0..2, 0 is greedy; -1: the model's default");
    field("max-tokens", self.max_tokens, "longest reply in tokens; 0: what the context leaves");
    field("thinking", self.thinking,
          "let the model think before it answers, where its template can");
    field("show-reasoning", self.show_reasoning, "print what it thinks (dimmed, on the terminal)");
  }
};

std::atomic<bool> g_interrupted = false;  // set by the signal handler alone

void on_interrupt(int) {
  if (g_interrupted.exchange(true)) _exit(130);  // a second Ctrl-C: the shell's code for it
}

// Prints a reply as it comes. On a terminal reasoning is dimmed; in a pipe it goes to stderr.
class Printer {
 public:
  Printer(bool terminal, bool show_reasoning)
      : terminal_(terminal), show_reasoning_(show_reasoning) {}

  void text(std::string_view text, bool is_reasoning) {
    if (is_reasoning && !show_reasoning_) return;
    if (is_reasoning != reasoning_) {
      if (terminal_) write(stdout, is_reasoning ? "\033[2m" : "\033[0m\n");
      reasoning_ = is_reasoning;
    }
    write(is_reasoning && !terminal_ ? stderr : stdout, text);
  }
  void end() {
    if (terminal_ && reasoning_) write(stdout, "\033[0m");
    reasoning_ = false;
    write(stdout, "\n");
  }

 private:
  static void write(FILE* file, std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), file);
    std::fflush(file);
  }
  bool terminal_, show_reasoning_;
  bool reasoning_ = false;
};

constexpr const char* kHelp =
    "  /reset    forget the conversation\n"
    "  /history  show it\n"
    "  /stats    tokens and time of the last reply\n"
    "  /exit     leave (or Ctrl-D)\n";

class Conversation {
 public:
  Conversation(ChatPeer& peer, const ChatOptions& options, bool terminal)
      : peer_(peer), options_(options), terminal_(terminal) {
    settings_.model = options.served_model;
    if (options.temperature >= 0) settings_.temperature = options.temperature;
    if (options.max_tokens > 0) settings_.max_tokens = options.max_tokens;
    // Templates without a switch for it are not asked.
    if (!options.thinking) settings_.thinking = false;
    reset();
  }

  // Exit code: that of the last reply, so that a script sees a failure.
  int run() {
    int exit_code = kExitOk;
    std::string line;
    while (prompt(), std::getline(std::cin, line)) {
      if (!line.empty() && line.back() == '\r') line.pop_back();
      if (line.find_first_not_of(" \t") == std::string::npos) continue;
      if (line == "/exit" || line == "/quit") break;
      if (line.front() == '/' && terminal_) {
        command(line);
        continue;
      }
      exit_code = say(line);
    }
    if (terminal_) std::fputs("\n", stderr);
    return exit_code;
  }

 private:
  void prompt() const {
    if (terminal_) std::fputs("> ", stderr);
  }

  void reset() {
    turns_.clear();
    if (!options_.system.empty()) turns_.push_back({"system", options_.system});
  }

  void command(const std::string& line) {
    if (line == "/reset") {
      reset();
    } else if (line == "/history") {
      for (const ChatTurn& turn : turns_) {
        std::fputs(fmt::format("{}: {}\n", turn.role, turn.content).c_str(), stderr);
      }
    } else if (line == "/stats") {
      std::fputs(stats_.empty() ? "no reply yet\n" : stats_.c_str(), stderr);
    } else {
      if (line != "/help") std::fputs(fmt::format("unknown command {}\n", line).c_str(), stderr);
      std::fputs(kHelp, stderr);
    }
  }

  int say(const std::string& message) {
    turns_.push_back({"user", message});
    g_interrupted = false;
    Printer printer(terminal_, options_.show_reasoning);
    const auto started = std::chrono::steady_clock::now();
    const Result<ChatReply> reply = peer_.reply(
        turns_, settings_,
        [&](std::string_view text, bool is_reasoning) { printer.text(text, is_reasoning); },
        g_interrupted);
    printer.end();
    if (!reply.is_ok()) {
      turns_.pop_back();  // a message without an answer would confuse the next turn
      if (reply.status().code() == StatusCode::kCancelled && g_interrupted) {
        std::fputs("(stopped)\n", stderr);
        g_interrupted = false;
        return kExitOk;
      }
      return fail(kChat.name, reply.status(), kExitFailed);
    }
    const ChatReply& done = *reply;
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    stats_ = fmt::format("{} prompt tokens ({} cached), {} generated in {:.1f} s{}\n",
                         done.prompt_tokens, done.cached_tokens, done.output_tokens,
                         seconds.count(), done.cut ? ", cut by the token limit" : "");
    if (done.cut) std::fputs("(cut by the token limit)\n", stderr);
    turns_.push_back({"assistant", done.content});
    return kExitOk;
  }

  ChatPeer& peer_;
  const ChatOptions& options_;
  const bool terminal_;
  ChatSettings settings_;
  std::vector<ChatTurn> turns_;
  std::string stats_;
};

}  // namespace

int run_chat(const Invocation& invocation) {
  ChatOptions options;
  EngineConfig config;
  Settings settings;
  settings.add(options, "Chat");
  settings.add(config, "Engine (without --url)");
  if (const auto exit_code = prepare(kChat, settings, invocation)) return *exit_code;
  if (const Status status = config.validate(); !status.is_ok()) {
    return fail(kChat.name, with_source(status, settings), kExitUsage);
  }
  set_log_level(LogLevel::kWarning);
  const bool terminal = isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0;
  if (terminal && options.url.empty()) std::fputs("loading...", stderr);
  Result<std::unique_ptr<ChatPeer>> peer =
      options.url.empty() ? make_local_peer(config) : make_http_peer(options.url);
  if (terminal && options.url.empty()) std::fputs("\r\033[K", stderr);
  if (!peer.is_ok()) return fail(kChat.name, with_source(peer.status(), settings));
  if (terminal) {
    std::fputs(
        fmt::format("{}. /help lists commands, /exit leaves.\n", (*peer)->description()).c_str(),
        stderr);
  }
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  sigaction(SIGINT, &action, nullptr);
  return Conversation(**peer, options, terminal).run();
}

}  // namespace kvarn::commands
