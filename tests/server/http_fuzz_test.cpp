// Random and mutated bytes on the wire never give a 5xx, a crash or a hang; the next valid request
// succeeds and nothing is left running.
#include <gtest/gtest.h>

#include <random>

#include <nlohmann/json.hpp>

#include "tests/server/http_client.h"
#include "tests/server/serving_fixture.h"

namespace kvarn::test {
namespace {

using namespace std::chrono_literals;

std::string mutate(std::string bytes, std::mt19937& random) {
  static const std::string alphabet =
      std::string("\r\n :/?{}[]\",\\;=-+0129azAZ\0\x80\xff\xc3", 30);
  for (unsigned edits = 1 + random() % 6; edits > 0 && !bytes.empty(); --edits) {
    const size_t at = random() % bytes.size();
    switch (random() % 5) {
      case 0:
        bytes[at] = alphabet[random() % alphabet.size()];
        break;
      case 1:
        bytes.erase(at, random() % 9);
        break;
      case 2:
        bytes.insert(at, 1, alphabet[random() % alphabet.size()]);
        break;
      case 3:
        bytes.insert(at, bytes.substr(random() % bytes.size(), random() % 40));
        break;
      default:
        bytes.resize(at);
    }
  }
  return bytes;
}

TEST(HttpFuzz, NeverBreaksTheServer) {
  ServingOptions options;
  options.server.header_seconds = options.server.body_seconds = 0.2;
  Serving serving(options);
  serving.script(1, "still right");
  const std::string good = post("/v1/completions", R"({"prompt":"x","seed":1,"max_tokens":20})");
  const std::vector<std::string> seeds = {
      good,
      post("/v1/chat/completions",
           R"({"messages":[{"role":"user","content":"h\u00e9"}],"stream":true,"max_tokens":3})"),
      post("/tokenize", R"({"prompt":"abc","return_token_strs":true})"),
      post("/detokenize", R"({"tokens":[1,2,3]})"),
      get("/v1/models/demo") + get("/metrics") + get("/health"),
      "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: "
      "chunked\r\n\r\n5\r\n{\"pro\r\nb\r\nmpt\":\"abcd\"\r\n1\r\n}\r\n0\r\n\r\n"};
  std::mt19937 random(99);
  int answered = 0;
  for (int i = 0; i < 600; ++i) {
    std::string bytes = mutate(seeds[random() % seeds.size()], random);
    if (i % 20 == 0) {
      bytes.assign(random() % 3000, '\0');
      for (char& byte : bytes) byte = static_cast<char>(random());
    }
    HttpClient client(serving.port());
    // In pieces at times: limits and parsers must not depend on how bytes arrive.
    const size_t cut = random() % 3 == 0 ? random() % (bytes.size() + 1) : bytes.size();
    client.send(std::string_view(bytes).substr(0, cut));
    client.send(std::string_view(bytes).substr(cut));
    const HttpResponse response = client.read_response(false, 60ms);
    if (response.status == 0) continue;  // it waits for more bytes
    ++answered;
    EXPECT_TRUE(response.status < 500 || response.status == 501) << response.status << "\n"
                                                                 << bytes;
    if (i % 50 == 0) {
      const HttpResponse valid = fetch(serving.port(), good);
      EXPECT_EQ(valid.status, 200);
      EXPECT_EQ(nlohmann::json::parse(valid.body)["choices"][0]["text"], "still right");
    }
  }
  EXPECT_GT(answered, 300);
  EXPECT_EQ(fetch(serving.port(), good).status, 200);
  EXPECT_TRUE(serving.wait_idle());
}

}  // namespace
}  // namespace kvarn::test
