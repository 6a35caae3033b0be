// Test parameters that run a kernel on every instruction set; those the host lacks are skipped by
// name, so that a green run shows what it has not covered.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "kernels/backend.h"

namespace kvarn::test {

constexpr CpuIsa kAllIsas[] = {CpuIsa::kScalar, CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16,
                               CpuIsa::kAmxBf16};

// Within a test body or SetUp().
#define SKIP_UNLESS_SUPPORTED(isa)                                                             \
  if (!::kvarn::cpu_isa_supported(isa)) {                                                      \
    GTEST_SKIP() << "this processor has no " << ::kvarn::cpu_isa_name(isa) << "; its best is " \
                 << ::kvarn::cpu_isa_name(::kvarn::best_cpu_isa());                            \
  }

class IsaTest : public ::testing::TestWithParam<CpuIsa> {
 protected:
  void SetUp() override { SKIP_UNLESS_SUPPORTED(GetParam()); }
};

inline std::string isa_param_name(const ::testing::TestParamInfo<CpuIsa>& info) {
  return cpu_isa_name(info.param);
}

#define INSTANTIATE_FOR_EVERY_ISA(suite)                                             \
  INSTANTIATE_TEST_SUITE_P(Isa, suite, ::testing::ValuesIn(::kvarn::test::kAllIsas), \
                           ::kvarn::test::isa_param_name)

}  // namespace kvarn::test
