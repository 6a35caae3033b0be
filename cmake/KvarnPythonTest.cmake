# kvarn_python_test(<name> SCRIPT tools/x.py LABELS ... [DEPS targets] [ARGS ...] [TIMEOUT s])
# runs a Python oracle as a ctest entry. Python is the test environment's (tests/requirements.txt),
# looked up when the test runs; without it the test is SKIPPED and says why.
include_guard(GLOBAL)
set(KVARN_TEST_PYTHON "${CMAKE_SOURCE_DIR}/build/venv/bin/python" CACHE FILEPATH
    "Python of the test environment")
function(kvarn_python_test name)
  cmake_parse_arguments(ARG "" "SCRIPT;TIMEOUT" "LABELS;DEPS;ARGS" ${ARGN})
  add_test(NAME ${name}
           COMMAND ${CMAKE_SOURCE_DIR}/tests/support/run_python_test.sh ${KVARN_TEST_PYTHON}
                   ${CMAKE_SOURCE_DIR}/${ARG_SCRIPT} ${ARG_ARGS}
           WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 300)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT}
                                          SKIP_RETURN_CODE 77)
endfunction()
