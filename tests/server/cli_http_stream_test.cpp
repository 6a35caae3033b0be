// The small HTTP client of `kvarn chat --url`: URLs, chunked bodies and event streams in pieces of
// any size, and bytes that are neither.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "server/commands/http_stream.h"

namespace kvarn::commands {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(ParseUrlTest, TakesHostsAndPortsInEveryForm) {
  const auto expect = [](const char* url, const char* host, const char* port) {
    const Result<HttpAddress> address = parse_url(url);
    ASSERT_TRUE(address.is_ok()) << url << ": " << address.status().message();
    EXPECT_EQ((*address).host, host) << url;
    EXPECT_EQ((*address).port, port) << url;
  };
  expect("http://127.0.0.1:8000", "127.0.0.1", "8000");
  expect("127.0.0.1:8000/", "127.0.0.1", "8000");
  expect("http://localhost", "localhost", "80");
  expect("http://localhost:9000/v1", "localhost", "9000");
  expect("http://[::1]:8000", "::1", "8000");
}

TEST(ParseUrlTest, RefusesOthersWithTheReason) {
  EXPECT_THAT(parse_url("https://x").status().message(), HasSubstr("https"));
  for (const char* url : {"", "http://", "ftp://x", "http://x:port", "http://x/path",
                          "http://x:", "http://user@x:1", "http://a b:1"}) {
    EXPECT_THAT(parse_url(url).status().message(), HasSubstr("--url")) << url;
  }
}

TEST(ChunkedDecoderTest, GivesTheSameBytesHoweverTheyAreCut) {
  const std::string coded =
      "5\r\nhello\r\n1;name=value\r\n \r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n";
  for (size_t piece = 1; piece <= coded.size(); ++piece) {
    ChunkedDecoder decoder;
    std::string out;
    for (size_t at = 0; at < coded.size(); at += piece) {
      EXPECT_FALSE(decoder.done());
      ASSERT_TRUE(decoder.push(std::string_view(coded).substr(at, piece), out));
    }
    EXPECT_TRUE(decoder.done());
    EXPECT_EQ(out, "hello 0123456789");
  }
}

TEST(ChunkedDecoderTest, SaysWhenTheCodingIsBroken) {
  for (const char* bad : {"x\r\n", "\r\n", "-1\r\n", "2\r\nabc\r\n", "5 \x01\r\nhello"}) {
    ChunkedDecoder decoder;
    std::string out;
    const bool ok = decoder.push(bad, out) && decoder.push("\r\n\r\n\r\n", out);
    EXPECT_FALSE(ok && decoder.done()) << bad;
  }
}

TEST(ChunkedDecoderTest, NoBytesMakeItCrashOrGrowBeyondItsInput) {
  std::mt19937 random(11);
  for (int i = 0; i < 20000; ++i) {
    ChunkedDecoder decoder;
    std::string out;
    size_t fed = 0;
    for (unsigned pieces = 1 + random() % 8; pieces > 0; --pieces) {
      std::string bytes(random() % 40, '\0');
      for (char& c : bytes) c = "0123aF\r\n;xyz\xff"[random() % 13];
      fed += bytes.size();
      if (!decoder.push(bytes, out)) break;
    }
    EXPECT_LE(out.size(), fed);
  }
}

std::vector<std::string> events_of(std::string_view bytes, size_t piece) {
  SseDecoder decoder;
  std::vector<std::string> events;
  for (size_t at = 0; at < bytes.size(); at += piece) {
    decoder.push(bytes.substr(at, piece), [&](const std::string& data) { events.push_back(data); });
  }
  return events;
}

TEST(SseDecoderTest, GivesThePayloadsAndSkipsComments) {
  const std::string text =
      ": ping\n\ndata: {\"a\":1}\n\nevent: x\ndata:two\ndata: lines\r\n\r\ndata: [DONE]\n\ndata: "
      "cut";
  for (size_t piece = 1; piece <= text.size(); ++piece) {
    EXPECT_THAT(events_of(text, piece), ElementsAre("{\"a\":1}", "two\nlines", "[DONE]"));
  }
}

}  // namespace
}  // namespace kvarn::commands
