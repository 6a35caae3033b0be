// kvarn.v1.Control: facts from ModelInfo and EngineStats. Answers also while draining; before the
// model is loaded only GetLoad does.
#include <algorithm>

#include "server/build_info.h"
#include "server/grpc_convert.h"
#include "server/grpc_service.h"

namespace kvarn {
namespace {

class ControlService : public v1::Control::CallbackService {
 public:
  ControlService(ServerState& state, CallRegistry& registry, std::vector<std::string> services)
      : state_(state), registry_(registry), services_(std::move(services)) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse* response) override {
    return answer(context, "Control/GetServerInfo", [&](const GenerationService& service) {
      const ModelInfo& model = service.model();
      response->set_version(build_info().version);
      response->set_api_version("kvarn.v1");
      response->set_instance_id(state_.instance_id);
      for (const std::string& name : services_) response->add_services(name);
      response->set_tensor_parallel_size(static_cast<uint32_t>(model.tensor_parallel_size));
      response->set_max_model_len(static_cast<uint32_t>(model.max_model_len));
      response->set_kv_block_size(static_cast<uint32_t>(model.block_size));
      response->set_total_kv_blocks(static_cast<uint64_t>(model.total_kv_blocks));
      response->set_kv_capacity_tokens(static_cast<uint64_t>(model.kv_capacity_tokens));
      response->set_kv_cache_dtype(model.kv_cache_dtype);
      response->set_max_running_requests(static_cast<uint32_t>(model.max_num_seqs));
      response->set_max_queued_requests(static_cast<uint32_t>(model.max_queued_requests));
      response->set_max_batched_tokens(static_cast<uint32_t>(model.max_num_batched_tokens));
      for (const FeatureInfo& info : model.features) {
        v1::Feature& feature = *response->add_features();
        feature.set_name(info.name);
        feature.set_enabled(info.enabled);
        feature.set_reason(info.reason);
      }
    });
  }

  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest*,
                                         v1::GetModelInfoResponse* response) override {
    return answer(context, "Control/GetModelInfo", [&](const GenerationService& service) {
      *response = grpc_convert::to_model_info(service.model());
    });
  }

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                    v1::GetLoadResponse* response) override {
    GrpcCall call(state_, registry_, *context, "Control/GetLoad");
    const EngineStats stats = state_.engine_stats();
    response->set_running(static_cast<uint32_t>(stats.running));
    response->set_waiting(static_cast<uint32_t>(stats.waiting));
    if (stats.pages_total > 0) {
      response->set_kv_usage(static_cast<double>(stats.pages_in_use) /
                             static_cast<double>(stats.pages_total));
    }
    response->set_kv_free_tokens(
        static_cast<uint64_t>(std::max<int64_t>(0, stats.capacity_tokens - stats.live_tokens)));
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(call.finish(Status::ok()));
    return reactor;
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest*,
                                  v1::AbortResponse*) override {
    return later_stage(context, "Control/Abort");
  }
  grpc::ServerUnaryReactor* ListRequests(grpc::CallbackServerContext* context,
                                         const v1::ListRequestsRequest*,
                                         v1::ListRequestsResponse*) override {
    return later_stage(context, "Control/ListRequests");
  }
  grpc::ServerUnaryReactor* ResetPrefixCache(grpc::CallbackServerContext* context,
                                             const v1::ResetPrefixCacheRequest*,
                                             v1::ResetPrefixCacheResponse*) override {
    return later_stage(context, "Control/ResetPrefixCache");
  }

 private:
  template <typename Fn>
  grpc::ServerUnaryReactor* answer(grpc::CallbackServerContext* context, const char* rpc,
                                   Fn&& fill) {
    GrpcCall call(state_, registry_, *context, rpc);
    Status status;
    if (const std::shared_ptr<GenerationService> service = state_.service()) {
      fill(*service);
    } else {
      status = {StatusCode::kUnavailable, "model_loading",
                "the model is still loading; try again shortly"};
    }
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(call.finish(status));
    return reactor;
  }

  grpc::ServerUnaryReactor* later_stage(grpc::CallbackServerContext* context, const char* rpc) {
    GrpcCall call(state_, registry_, *context, rpc);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(call.finish(Status::unimplemented(std::string("kvarn.v1.") + rpc +
                                                      " is not in this version of the server")));
    return reactor;
  }

  ServerState& state_;
  CallRegistry& registry_;
  const std::vector<std::string> services_;
};

}  // namespace

std::unique_ptr<v1::Control::CallbackService> make_control_service(
    ServerState& state, CallRegistry& registry, std::vector<std::string> services) {
  return std::make_unique<ControlService>(state, registry, std::move(services));
}

}  // namespace kvarn
