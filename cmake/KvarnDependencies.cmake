# Every third-party library, looked up once. Minimum versions are those of Debian 12.
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(fmt 9 REQUIRED)
find_package(spdlog 1.10 REQUIRED)
find_package(nlohmann_json 3.11 REQUIRED)

# spdlog header-only over header-only fmt: no run-time libraries to ship. Only log.cpp includes it.
add_library(kvarn_spdlog INTERFACE)
target_link_libraries(kvarn_spdlog INTERFACE spdlog::spdlog_header_only fmt::fmt-header-only)

if(KVARN_SERVER)
  find_package(CLI11 2 REQUIRED)
  find_package(Boost 1.81 REQUIRED)  # headers only: Beast and Asio
  find_package(OpenSSL 3 REQUIRED)
  pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8>=10.40)
  pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc>=2.6)
  find_package(Protobuf REQUIRED)
  find_program(GRPC_CPP_PLUGIN grpc_cpp_plugin REQUIRED)

  # The distribution's CMake config exports shared gRPC only. Static linking keeps `kvarn` one file.
  # Reflection registers itself from a static initialiser, which the linker drops unless told not to.
  pkg_check_modules(GRPC REQUIRED grpc++ protobuf)
  find_library(GRPC_REFLECTION NAMES libgrpc++_reflection.a REQUIRED)
  add_library(kvarn_grpc INTERFACE)
  target_include_directories(kvarn_grpc SYSTEM INTERFACE ${GRPC_STATIC_INCLUDE_DIRS})
  target_link_directories(kvarn_grpc INTERFACE ${GRPC_STATIC_LIBRARY_DIRS})
  target_link_libraries(kvarn_grpc INTERFACE
    -Wl,--whole-archive ${GRPC_REFLECTION} -Wl,--no-whole-archive
    -Wl,--start-group -Wl,-Bstatic ${GRPC_STATIC_LIBRARIES} -Wl,-Bdynamic -Wl,--end-group
    Threads::Threads dl rt m)

  find_library(PCRE2_STATIC NAMES libpcre2-8.a REQUIRED)
  find_library(UTF8PROC_STATIC NAMES libutf8proc.a REQUIRED)
  add_library(kvarn_unicode INTERFACE)
  target_include_directories(kvarn_unicode SYSTEM INTERFACE ${PCRE2_INCLUDE_DIRS} ${UTF8PROC_INCLUDE_DIRS})
  target_compile_definitions(kvarn_unicode INTERFACE PCRE2_CODE_UNIT_WIDTH=8 UTF8PROC_STATIC)
  target_link_libraries(kvarn_unicode INTERFACE ${PCRE2_STATIC} ${UTF8PROC_STATIC})

  add_library(kvarn_beast INTERFACE)
  target_link_libraries(kvarn_beast INTERFACE Boost::headers Threads::Threads)
  target_compile_definitions(kvarn_beast INTERFACE BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_DISABLE_VISIBILITY)
endif()
if(KVARN_TESTS)
  find_package(GTest 1.12 REQUIRED)
endif()
find_package(benchmark QUIET)  # bench/ is skipped without it
