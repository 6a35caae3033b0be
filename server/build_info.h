// Facts of the build, for /version, metrics, GetServerInfo and the `version` command.
#pragma once

#include <string>
#include <vector>

namespace kvarn {

struct BuildInfo {
  std::string version;                  // "0.1.0"
  std::string commit;                   // short hash, "unknown" outside a git tree
  std::string build_type;               // "Release"
  std::string cuda;                     // toolkit version, empty without the CUDA backend
  std::vector<std::string> cuda_archs;  // "90a"
};

const BuildInfo& build_info();

}  // namespace kvarn
