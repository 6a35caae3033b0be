# kvarn_test(<area>/<name> LABELS ... DEPS ... [SOURCES extra.cpp] [TIMEOUT s] [ENV K=V ...])
# builds tests/<area>/<name>_test.cpp and registers it as one ctest entry named <area>/<name>.
# One entry per binary: discovery would run the binary at build time and bake in absolute paths.
include(GoogleTest)
function(kvarn_test path)
  cmake_parse_arguments(ARG "" "TIMEOUT" "LABELS;DEPS;SOURCES;ENV" ${ARGN})
  string(REPLACE "/" "_" target ${path}_test)
  add_executable(${target} ${CMAKE_SOURCE_DIR}/tests/${path}_test.cpp ${ARG_SOURCES})
  target_link_libraries(${target} PRIVATE kvarn_flags ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  target_compile_definitions(${target} PRIVATE KVARN_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  # Tests live in bin/tests, so that a copied folder of binaries runs elsewhere (a GPU machine).
  set_target_properties(${target} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin/tests)
  add_test(NAME ${path} COMMAND ${target} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set_tests_properties(${path} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  if("cuda" IN_LIST ARG_LABELS)  # gtest answers 0 when every test was skipped
    set_tests_properties(${path} PROPERTIES SKIP_REGULAR_EXPRESSION "\\[  PASSED  \\] 0 tests")
  endif()
  if(ARG_ENV)
    set_tests_properties(${path} PROPERTIES ENVIRONMENT "${ARG_ENV}")
  endif()
endfunction()
