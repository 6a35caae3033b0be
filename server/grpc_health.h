// grpc.health.v1.Health over the server's health state: SERVING in state ok, else NOT_SERVING, for
// "" and every mounted service. Thread-safe; `health` outlives the service.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/health.h"

namespace kvarn {

std::unique_ptr<grpc::health::v1::Health::CallbackService> make_health_service(
    Health& health, std::vector<std::string> services);

}  // namespace kvarn
