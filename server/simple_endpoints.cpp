#include "server/simple_endpoints.h"

#include "server/http_status.h"
#include "server/info_api.h"
#include "server/text_api.h"

namespace kvarn {
namespace {

HttpAnswer health_answer(ServerState& state, HealthProbe probe) {
  const HealthState health = state.health.state();
  HttpAnswer answer =
      json_answer(health_body(health, state.engine_stats()), health_http_status(probe, health));
  return answer;
}

HttpAnswer metrics_answer(ServerState& state) {
  HttpAnswer answer;
  answer.content_type = "text/plain; version=0.0.4; charset=utf-8";
  answer.body = state.metrics.render(state.engine_stats());
  return answer;
}

Result<std::string> loaded_body(ServerState& state, const Endpoint& endpoint, std::string_view path,
                                std::string_view body) {
  KVARN_ASSIGN_OR_RETURN(const std::shared_ptr<GenerationService> service, state.loaded());
  switch (endpoint.handler) {
    case Handler::kModels:
      return models_body(service->model(), state.engine_stats());
    case Handler::kModel: {
      const std::string name = path_id(endpoint, path);
      KVARN_RETURN_IF_ERROR(service->check_model(name, kHttpParams));
      return *model_body(service->model(), state.engine_stats(), name);
    }
    case Handler::kVersion:
      return version_body(service->model().backend);
    case Handler::kTokenize:
      return answer_tokenize(*service, body);
    case Handler::kDetokenize:
      return answer_detokenize(*service, body);
    case Handler::kApplyTemplate:
      return answer_apply_template(*service, body);
    default:
      return Status::internal("an endpoint without a handler");
  }
}

}  // namespace

HttpAnswer answer_simple(ServerState& state, const Endpoint& endpoint, std::string_view path,
                         std::string_view body, const std::string& request_id) {
  switch (endpoint.handler) {
    case Handler::kHealth:
      return health_answer(state, HealthProbe::kHealth);
    case Handler::kLive:
      return health_answer(state, HealthProbe::kLive);
    case Handler::kReady:
      return health_answer(state, HealthProbe::kReady);
    case Handler::kMetrics:
      return metrics_answer(state);
    default:
      break;
  }
  Result<std::string> result = loaded_body(state, endpoint, path, body);
  if (result.is_ok()) return json_answer(std::move(*result));
  return error_answer(public_error(result.status(), request_id), state.retry_after_seconds());
}

}  // namespace kvarn
