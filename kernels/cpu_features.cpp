// What this processor can do, asked once. AMX needs the kernel's permission as well: it is asked
// for here, before any thread touches a tile.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/backend.h"
#include "kernels/ops_cpu.h"

namespace kvarn {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux grants the 8 KiB of tile state per process on request (arch_prctl(2), since 5.16).
bool request_amx_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

bool has_amx_bf16() {
  if (!has_avx512_bf16()) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0 && request_amx_permission();
}
#endif

CpuIsa find_best_isa() {
#if defined(__x86_64__)
  if (has_amx_bf16()) return CpuIsa::kAmxBf16;
  if (has_avx512_bf16()) return CpuIsa::kAvx512Bf16;
  if (has_avx512()) return CpuIsa::kAvx512;
  if (has_avx2()) return CpuIsa::kAvx2;
#endif
  return CpuIsa::kScalar;
}

// CPUs worth of time that the cgroup grants, or a large number without a limit.
int cgroup_cpus() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");  // "max 100000" or "<quota> <period>"
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return 1 << 20;
  return std::max(1, static_cast<int>(quota / period + 0.5));
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kScalar:
      return "scalar";
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
    case CpuIsa::kAmxBf16:
      return "amx_bf16";
  }
  return "?";
}

CpuIsa best_cpu_isa() {
  static const CpuIsa best = find_best_isa();
  return best;
}

// Each level contains the ones before it.
bool cpu_isa_supported(CpuIsa isa) { return isa <= best_cpu_isa(); }

namespace cpu {

int physical_cores() {
  int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
    std::set<std::pair<int, int>> seen;  // (package, core)
    bool complete = true;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      const std::string topology =
          "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
      std::ifstream package_file(topology + "physical_package_id"), core_file(topology + "core_id");
      int package = 0, core = 0;
      if (package_file >> package && core_file >> core) {
        seen.emplace(package, core);
      } else {
        complete = false;
      }
    }
    cores = complete && !seen.empty() ? static_cast<int>(seen.size()) : CPU_COUNT(&allowed);
  }
#endif
  return std::clamp(cores, 1, cgroup_cpus());
}

}  // namespace cpu
}  // namespace kvarn
