// The services of kvarn.v1 on gRPC's callback API: Inference (one reactor class per generating RPC)
// and Control. Nothing here schedules or generates: calls go to the GenerationService that both
// doors share. Thread-safe; `state` and `registry` outlive the services.
#pragma once

#include <memory>

#include "inference.grpc.pb.h"
#include "server/grpc_call.h"
#include "server/server_state.h"

namespace kvarn {

std::unique_ptr<v1::Inference::CallbackService> make_inference_service(ServerState& state,
                                                                       CallRegistry& registry);
// `services`: full names of what is mounted, for GetServerInfo.
std::unique_ptr<v1::Control::CallbackService> make_control_service(
    ServerState& state, CallRegistry& registry, std::vector<std::string> services);

}  // namespace kvarn
