# Resolves KVARN_CUDA to KVARN_WITH_CUDA. Runs before the first target: a target made before
# enable_language(CUDA) keeps empty CUDA properties and fails at generate time.
set(KVARN_WITH_CUDA OFF)
if(KVARN_CUDA STREQUAL "ON" OR KVARN_CUDA STREQUAL "AUTO")
  find_program(KVARN_NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin)
  if(KVARN_NVCC)
    set(KVARN_WITH_CUDA ON)
  elseif(KVARN_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVARN_CUDA=ON but nvcc was not found; install the CUDA toolkit (13 or newer) "
                        "or put nvcc on PATH, or configure with -DKVARN_CUDA=OFF")
  endif()
elseif(NOT KVARN_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "KVARN_CUDA must be AUTO, ON or OFF, got '${KVARN_CUDA}'")
endif()
# Sanitizers of the host compiler and device code do not mix well: those builds are for the CPU.
if(KVARN_WITH_CUDA AND NOT KVARN_SANITIZE STREQUAL "" AND KVARN_CUDA STREQUAL "AUTO")
  set(KVARN_WITH_CUDA OFF)
endif()

if(KVARN_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER ${KVARN_NVCC})
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  endif()
  enable_language(CUDA)
  if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know nvcc's C++20
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  find_package(CUDAToolkit 12 REQUIRED)
  # libcublasLt is the one shared library of a CUDA build: beside the program, where the toolkit of
  # the build machine has it, or where toolkits usually are.
  set(kvarn_cuda_rpath "$ORIGIN/../lib" ${CUDAToolkit_LIBRARY_DIR} /usr/local/cuda/lib64
                       /usr/local/cuda/targets/x86_64-linux/lib)
  list(APPEND CMAKE_BUILD_RPATH ${kvarn_cuda_rpath})
  list(APPEND CMAKE_INSTALL_RPATH ${kvarn_cuda_rpath})
endif()
message(STATUS "CUDA backend: ${KVARN_WITH_CUDA} (KVARN_CUDA=${KVARN_CUDA})")
