// The GPU behind the seam: one stream, on which every op is a launch of its kernel family. Weights,
// pool and arena are the caller's Buffers; this class owns what steps need besides: staging, plans,
// scratch, sampler. Launchers check shapes; nothing is allocated and nothing waits between
// begin_step() and end_step(), which waits once.
#include <cuda_runtime_api.h>

#include <exception>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/attention_cuda.h"
#include "kernels/backend.h"
#include "kernels/core/check.h"
#include "kernels/cuda_check.h"
#include "kernels/cuda_memory.h"
#include "kernels/linear_cuda.h"
#include "kernels/ops_cuda.h"
#include "kernels/random_fill.h"
#include "kernels/sampling_cuda.h"
#include "kernels/step_staging_cuda.h"

namespace kvarn {
namespace {

class Stream {
 public:
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }  // NOLINT(google-explicit-constructor)

 private:
  cudaStream_t stream_ = nullptr;
};

// Times stretches of the stream; seconds() once the stream has passed them.
class StretchTimer {
 public:
  StretchTimer() = default;
  ~StretchTimer() {
    for (const Stretch& s : stretches_) {
      cudaEventDestroy(s.begin);
      cudaEventDestroy(s.end);
    }
  }
  StretchTimer(const StretchTimer&) = delete;
  StretchTimer& operator=(const StretchTimer&) = delete;

  void reset() { used_ = 0; }
  void begin(cudaStream_t stream) {
    if (used_ == stretches_.size()) stretches_.push_back(make());
    CUDA_CHECK(cudaEventRecord(stretches_[used_].begin, stream));
  }
  void end(cudaStream_t stream) { CUDA_CHECK(cudaEventRecord(stretches_[used_++].end, stream)); }
  double seconds() const {
    double total = 0;
    for (size_t i = 0; i < used_; ++i) {
      float ms = 0;
      CUDA_CHECK(cudaEventElapsedTime(&ms, stretches_[i].begin, stretches_[i].end));
      total += 1e-3 * static_cast<double>(ms);
    }
    return total;
  }

 private:
  struct Stretch {
    cudaEvent_t begin, end;
  };
  static Stretch make() {
    Stretch s{};
    CUDA_CHECK(cudaEventCreate(&s.begin));
    CUDA_CHECK(cudaEventCreate(&s.end));
    return s;
  }
  std::vector<Stretch> stretches_;  // grows to the most that a step had
  size_t used_ = 0;
};

class GraphRecording final : public Recording {
 public:
  GraphRecording(cudaGraph_t graph, cudaStream_t stream) : stream_(stream) {
    CUDA_CHECK(cudaGraphInstantiate(&graph_, graph, 0));
    CUDA_CHECK(cudaGraphUpload(graph_, stream_));
  }
  ~GraphRecording() override { cudaGraphExecDestroy(graph_); }
  GraphRecording(const GraphRecording&) = delete;
  GraphRecording& operator=(const GraphRecording&) = delete;
  void replay() override { CUDA_CHECK(cudaGraphLaunch(graph_, stream_)); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

// What steps within some limits need.
struct StepResources {
  StepResources(const StepLimits& step_limits, int multiprocessors)
      : limits(step_limits),
        decode(limits, multiprocessors),
        prefill(limits, multiprocessors),
        sampler(limits),
        staging(limits, decode.max_plan_bytes(), prefill.max_plan_bytes()) {}

  StepLimits limits;
  cuda::DecodeAttention decode;
  cuda::PrefillAttention prefill;
  cuda::Sampler sampler;
  cuda::StepStaging staging;
};

class CudaBackend final : public Backend {
 public:
  // `device` is the calling thread's current one.
  CudaBackend(int device, const cudaDeviceProp& properties)
      : device_(device),
        multiprocessors_(properties.multiProcessorCount),
        name_(std::string("cuda (") + properties.name + ", compute capability " +
              std::to_string(properties.major) + "." + std::to_string(properties.minor) + ")"),
        linear_(stream_) {}

  std::string name() const override { return name_; }
  int threads() const override { return 1; }
  DType activation_dtype() const override { return DType::kBF16; }
  std::optional<DeviceMemory> device_memory() const override {
    use_device();
    DeviceMemory memory{};
    CUDA_CHECK(cudaMemGetInfo(&memory.free_bytes, &memory.total_bytes));
    return memory;
  }
  Buffer allocate(size_t bytes) override {
    use_device();
    return cuda::allocate_device(bytes);
  }
  void* upload(const void* host, size_t bytes, Buffer& into, size_t offset) override {
    CHECK(offset + bytes <= into.bytes(), "upload: the buffer is large enough");
    use_device();
    std::byte* const to = into.data() + offset;
    CUDA_CHECK(cudaMemcpyAsync(to, host, bytes, cudaMemcpyHostToDevice, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));  // `host` may go
    return to;
  }
  void download(const void* from, size_t bytes, void* host) override {
    use_device();
    CUDA_CHECK(cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, stream_));
    CUDA_CHECK(cudaStreamSynchronize(stream_));
  }
  void fill_normal(Tensor out, float stddev, uint64_t seed) override {
    use_device();
    if (quantiles_stddev_ != stddev) {
      const std::vector<bf16> quantiles = normal_quantiles(stddev);
      const size_t bytes = quantiles.size() * sizeof(bf16);
      if (quantiles_.bytes() == 0) quantiles_ = cuda::allocate_device(bytes);
      upload(quantiles.data(), bytes, quantiles_, 0);
      quantiles_stddev_ = stddev;
    }
    cuda::fill_normal(stream_, out, reinterpret_cast<const bf16*>(quantiles_.data()), seed);
  }

  void reserve(const StepLimits& limits) override {
    if (resources_ != nullptr && resources_->limits == limits) return;
    for (const auto& kept : all_resources_) {
      if (kept->limits == limits) {
        resources_ = kept.get();
        return;
      }
    }
    use_device();
    all_resources_.push_back(std::make_unique<StepResources>(limits, multiprocessors_));
    resources_ = all_resources_.back().get();
  }

  StepInput begin_step(const StepInput& host, std::span<const SamplingRow> sampling) override {
    CHECK(resources_ != nullptr, "reserve() comes before the first step");
    use_device();
    // After a step that failed on its way: its copies may still read the staging memory.
    if (step_is_open_) CUDA_CHECK(cudaStreamSynchronize(stream_));
    step_is_open_ = true;
    encode_timer_.reset();
    StepResources& r = *resources_;
    const auto num_decodes = static_cast<size_t>(host.num_decode_sequences);
    CHECK(num_decodes <= host.sequences.size() && sampling.size() <= host.logit_rows.size(),
          "decodes are sequences, sampled rows are logit rows");
    chunks_ = host.sequences.subspan(num_decodes);
    const size_t decode_plan = num_decodes == 0 ? 0
                                                : r.decode.plan(host.sequences.first(num_decodes),
                                                                r.staging.host_decode_plan());
    const size_t prefill_plan =
        chunks_.empty() ? 0 : r.prefill.plan(chunks_, r.staging.host_prefill_plan());
    r.sampler.stage(stream_, sampling);
    return r.staging.send(stream_, host, decode_plan, prefill_plan);
  }

  StepTimes end_step(std::span<SampledToken> tokens) override {
    step_is_open_ = false;
    CUDA_CHECK(cudaStreamSynchronize(stream_));
    if (!tokens.empty()) resources_->sampler.collect(tokens);
    return {.encode_seconds = encode_timer_.seconds()};
  }

  std::unique_ptr<Recording> record(const std::function<void()>& ops) override {
    use_device();
    // Other threads' calls (allocations of a library) must not break the capture of this one.
    CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    is_recording_ = true;
    std::exception_ptr failure;
    try {
      ops();
    } catch (...) {
      failure = std::current_exception();
    }
    is_recording_ = false;
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
    const std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, void (*)(cudaGraph_t)> owner(
        graph, [](cudaGraph_t g) { cudaGraphDestroy(g); });
    if (failure) {
      cudaGetLastError();  // of the broken capture; the failure tells why
      std::rethrow_exception(failure);
    }
    CUDA_CHECK(ended);
    return std::make_unique<GraphRecording>(graph, stream_);
  }

  void embed(const int32_t* token_ids, Tensor table, Tensor out) override {
    cuda::embed(stream_, token_ids, table, out);
  }
  void rms_norm(Tensor x, Tensor weight, float eps, Tensor y) override {
    cuda::rms_norm(stream_, x, weight, eps, y);
  }
  void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, float eps, Tensor y) override {
    cuda::add_rms_norm(stream_, residual, delta, weight, eps, y);
  }
  void add(Tensor residual, Tensor delta) override { cuda::add(stream_, residual, delta); }
  void linear(Tensor x, const LinearWeight& weight, Tensor y) override {
    run_linear([&] { linear_.run(x, weight, y); });
  }
  // A norm of its own is faster than one taken along by every block of the matrix behind it.
  void norm_gate_up(const NormedInput& input, const LinearWeight& gate_up, Tensor scratch,
                    Tensor y) override {
    if (input.x.dim(0) > cuda::kFewRows) return Backend::norm_gate_up(input, gate_up, scratch, y);
    rms_norm(input.x, input.weight, input.eps, input.scratch);
    run_linear([&] { linear_.run_fused(input.scratch, gate_up, cuda::LinearResult::kSiluMul, y); });
  }
  void linear_add(Tensor x, const LinearWeight& weight, Tensor /*scratch*/,
                  Tensor residual) override {
    run_linear([&] { linear_.run_fused(x, weight, cuda::LinearResult::kAdd, residual); });
  }
  void qk_norm_rope_rotate(const QkvParams& params) override {
    cuda::qk_norm_rope_rotate(stream_, params);
  }
  void kv_write(const KvWriteParams& params) override { cuda::kv_write(stream_, params); }
  void kv_encode(const KvEncodeParams& params) override {
    if (params.tiles.empty()) return;
    if (!is_recording_) encode_timer_.begin(stream_);
    cuda::kv_encode(stream_, params);
    if (!is_recording_) encode_timer_.end(stream_);
  }
  void attention_decode(const AttentionParams& params) override {
    if (params.sequences.empty()) return;
    resources_->decode.run(stream_, params, resources_->staging.decode_plan());
  }
  void attention_prefill(const AttentionParams& params) override {
    CHECK(params.sequences.size() == chunks_.size(), "attention_prefill: the step's chunks");
    if (chunks_.empty()) return;
    resources_->prefill.run(stream_, params, chunks_, resources_->staging.prefill_plan());
  }
  void silu_mul(Tensor gate_up, Tensor y) override { cuda::silu_mul(stream_, gate_up, y); }
  void gather_rows(Tensor x, std::span<const int32_t> rows, Tensor y) override {
    cuda::gather_rows(stream_, x, rows.data(), static_cast<int64_t>(rows.size()), y);
  }
  void sample(Tensor logits) override {
    if (logits.dim(0) > 0) resources_->sampler.run(stream_, logits);
  }

 private:
  // The current device is a property of each thread; start-up and steps run on different ones.
  void use_device() const { CUDA_CHECK(cudaSetDevice(device_)); }

  // The library's own errors do not tell a lost device from a refused shape; the stream does.
  template <typename Run>
  void run_linear(const Run& run) {
    try {
      run();
    } catch (const DeviceLost&) {
      throw;
    } catch (const std::runtime_error&) {
      const cudaError_t state = is_recording_ ? cudaSuccess : cudaStreamQuery(stream_);
      if (state != cudaErrorNotReady) CUDA_CHECK(state);
      throw;
    }
  }

  const int device_;
  const int multiprocessors_;
  const std::string name_;
  Stream stream_;
  cuda::Linear linear_;
  Buffer quantiles_;  // of N(0, quantiles_stddev_), for fill_normal
  float quantiles_stddev_ = std::numeric_limits<float>::quiet_NaN();  // unequal to any
  std::vector<std::unique_ptr<StepResources>> all_resources_;
  StepResources* resources_ = nullptr;  // of the limits reserved last
  // Of the step that is open.
  bool step_is_open_ = false;
  bool is_recording_ = false;
  std::span<const AttentionSequence> chunks_;  // on the host
  StretchTimer encode_timer_;
};

// Kernels are machine code of the architectures of the build: runs one to see.
Status check_kernels_run(CudaBackend& backend, const std::string& name) {
  try {
    constexpr int kElements = 8;
    Buffer memory = backend.allocate(kElements * sizeof(bf16));
    backend.fill_normal(Tensor(memory.data(), DType::kBF16, {kElements}), 1.f, 0);
    bf16 values[kElements];
    backend.download(memory.data(), sizeof(values), values);
    return {};
  } catch (const DeviceLost&) {
    throw;
  } catch (const std::runtime_error& error) {
    return Status::unavailable("the GPU kernels of this build do not run on " + name + " (" +
                               error.what() +
                               "); build with its CMAKE_CUDA_ARCHITECTURES, or use --device cpu");
  }
}

}  // namespace

Result<std::unique_ptr<Backend>> make_cuda_backend(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ||
      (error == cudaSuccess && count == 0)) {
    return Status::unavailable(std::string("no NVIDIA GPU can be used here (") +
                               cudaGetErrorName(error) + "); use --device cpu");
  }
  if (error != cudaSuccess) {
    return Status::internal(std::string("cudaGetDeviceCount failed: ") + cudaGetErrorName(error) +
                            ": " + cudaGetErrorString(error));
  }
  if (device < 0 || device >= count) {
    return Status::invalid_argument("CUDA device " + std::to_string(device) +
                                    " does not exist; this machine has " + std::to_string(count));
  }
  try {
    CUDA_CHECK(cudaSetDevice(device));
    cudaDeviceProp properties{};
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    auto backend = std::make_unique<CudaBackend>(device, properties);
    KVARN_RETURN_IF_ERROR(check_kernels_run(*backend, backend->name()));
    return std::unique_ptr<Backend>(std::move(backend));
  } catch (const std::bad_alloc&) {
    return Status::resource_exhausted("CUDA device " + std::to_string(device) +
                                      " has no memory left to begin with; see nvidia-smi");
  } catch (const std::runtime_error& failure) {
    return Status::internal("CUDA device " + std::to_string(device) +
                            " cannot be used: " + failure.what());
  }
}

}  // namespace kvarn
