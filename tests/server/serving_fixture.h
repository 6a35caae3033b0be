// A whole server in the test process: the real engine on a runner that scripts tokens, the demo
// model's tokenizer and template, and the HTTP door on a free port.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/tokenizer/tokenizer.h"
#include "server/http_server.h"
#include "server/lifecycle.h"
#include "server/server_state.h"
#include "tests/support/fake_model_runner.h"

namespace kvarn::test {

// Lets a test hold the engine in a step: steps wait while it is closed.
class Gate {
 public:
  void close();
  void open();
  void pass();  // called by the runner

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
};

struct ServingOptions {
  EngineConfig engine;
  ServerConfig server;
  FakeRunnerOptions runner;
  bool loaded = true;
  ServingOptions();
};

const Tokenizer& demo_tokenizer();
constexpr int32_t kDemoEos = 6120;  // <|im_end|>

class Serving {
 public:
  explicit Serving(ServingOptions options = {});
  ~Serving();

  // What the model says for requests with this seed: the tokens of `text`, then EOS. Seeds without
  // a script repeat " token" for ever.
  void script(int64_t seed, const std::string& text);
  void script_tokens(int64_t seed, std::vector<int32_t> tokens);
  void load();  // with options.loaded == false: ends the loading
  int port() const { return http->port(); }
  EngineStats stats() const { return engine->stats(); }
  // Waits until nothing runs; false after 10 s.
  bool wait_idle() const;

  Gate gate;
  ServerState state;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<HttpServer> http;
  std::unique_ptr<Lifecycle> lifecycle;

 private:
  int32_t next_token(const SamplingRow& row);

  ServingOptions options_;
  std::mutex scripts_mutex_;
  std::map<uint64_t, std::vector<int32_t>> scripts_;
};

}  // namespace kvarn::test
