// `kvarn version`: the facts of GET /version, for people or as JSON.
#include <cstdio>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/backend.h"
#include "server/build_info.h"
#include "server/commands/commands.h"

namespace kvarn::commands {
namespace {

const CommandSpec kVersion = {"version", "Prints version and build facts.",
                              "  kvarn version\n  kvarn version --json\n"};

struct VersionOptions {
  bool json = false;
  static void visit(auto& self, auto&& field) {
    field("json", self.json, "one JSON object on stdout");
  }
};

}  // namespace

int run_version(const Invocation& invocation) {
  VersionOptions options;
  Settings settings;
  settings.add(options, "Output");
  if (const auto exit_code = prepare(kVersion, settings, invocation)) return *exit_code;
  const BuildInfo& build = build_info();
  if (options.json) {
    nlohmann::ordered_json out = {
        {"version", build.version},        {"commit", build.commit},
        {"build_type", build.build_type},  {"cuda", nullptr},
        {"cuda_archs", build.cuda_archs},  {"cpu_isa", cpu_isa_name(best_cpu_isa())},
        {"api", {"openai-v1", "kvarn.v1"}}};
    if (!build.cuda.empty()) out["cuda"] = build.cuda;
    std::puts(out.dump().c_str());
    return kExitOk;
  }
  std::puts(fmt::format("kvarn {} ({}, {}, CUDA {}, CPU {})", build.version, build.commit,
                        build.build_type, build.cuda.empty() ? "not built in" : build.cuda,
                        cpu_isa_name(best_cpu_isa()))
                .c_str());
  return kExitOk;
}

}  // namespace kvarn::commands
