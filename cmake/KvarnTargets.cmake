# kvarn_library(<name> SOURCES ... PUBLIC <targets> PRIVATE <targets>): one static library per folder,
# with our warnings. Flags sit on targets, never in CMAKE_CXX_FLAGS, so third-party code keeps its own.

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

add_library(kvarn_flags INTERFACE)
target_include_directories(kvarn_flags INTERFACE ${CMAKE_SOURCE_DIR})
set(_cxx_warnings -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Wold-style-cast
                  -Woverloaded-virtual -Wimplicit-fallthrough)
if(KVARN_WERROR)
  list(APPEND _cxx_warnings -Werror)
endif()
target_compile_options(kvarn_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${_cxx_warnings}>")
# a*b+c is contracted to an FMA only where we write one: results must not depend on the optimiser.
target_compile_options(kvarn_flags INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>")

# Sanitizers reach everything that is compiled here, kvarn's code and tests alike.
if(KVARN_SANITIZE STREQUAL "address")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=address,undefined)
elseif(KVARN_SANITIZE STREQUAL "thread")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=thread>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>)
  add_link_options(-fsanitize=thread)
elseif(NOT KVARN_SANITIZE STREQUAL "")
  message(FATAL_ERROR "KVARN_SANITIZE must be empty, address or thread, got '${KVARN_SANITIZE}'")
endif()

function(kvarn_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC kvarn_flags ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
endfunction()

function(kvarn_executable name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE kvarn_flags ${ARG_DEPS})
endfunction()
