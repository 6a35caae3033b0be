#include "server/grpc_health.h"

#include <algorithm>
#include <mutex>
#include <optional>

namespace kvarn {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ServingStatus = HealthCheckResponse::ServingStatus;

ServingStatus serving_status(HealthState state) {
  return state == HealthState::kOk ? HealthCheckResponse::SERVING
                                   : HealthCheckResponse::NOT_SERVING;
}

// Sends the newest state whenever it differs from the one sent last; a state that came and went
// while a write was in flight is skipped. Owns itself until OnDone.
class WatchReactor : public grpc::ServerWriteReactor<HealthCheckResponse>,
                     public std::enable_shared_from_this<WatchReactor> {
 public:
  static grpc::ServerWriteReactor<HealthCheckResponse>* start(Health& health, bool known) {
    auto reactor = std::make_shared<WatchReactor>(health);
    reactor->self_ = reactor;
    if (known) {
      reactor->subscription_ = health.subscribe([weak = reactor->weak_from_this()](HealthState s) {
        if (const auto self = weak.lock()) self->update(serving_status(s));
      });
    } else {
      reactor->update(HealthCheckResponse::SERVICE_UNKNOWN);
    }
    return reactor.get();
  }

  explicit WatchReactor(Health& health) : health_(health) {}

  void OnCancel() override {
    {
      const std::lock_guard lock(mutex_);
      if (finished_) return;
      finished_ = true;
    }
    Finish(grpc::Status::CANCELLED);
  }

  void OnWriteDone(bool ok) override {
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      if (!ok) return;  // OnCancel follows
    }
    write_newest();
  }

  void OnDone() override {
    if (subscription_) health_.unsubscribe(*subscription_);
    self_.reset();
  }

 private:
  void update(ServingStatus status) {
    {
      const std::lock_guard lock(mutex_);
      newest_ = status;
    }
    write_newest();
  }

  void write_newest() {
    {
      const std::lock_guard lock(mutex_);
      if (writing_ || finished_ || sent_ == newest_) return;
      writing_ = true;
      sent_ = newest_;
      message_.set_status(*newest_);
    }
    StartWrite(&message_);
  }

  Health& health_;
  std::optional<int> subscription_;
  std::mutex mutex_;  // guards what follows
  bool writing_ = false, finished_ = false;
  std::optional<ServingStatus> newest_, sent_;
  HealthCheckResponse message_;  // of the write in flight

  std::shared_ptr<WatchReactor> self_;  // until OnDone
};

class HealthService : public grpc::health::v1::Health::CallbackService {
 public:
  HealthService(Health& health, std::vector<std::string> services)
      : health_(health), services_(std::move(services)) {}

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const HealthCheckRequest* request,
                                  HealthCheckResponse* response) override {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    if (is_known(request->service())) {
      response->set_status(serving_status(health_.state()));
      reactor->Finish(grpc::Status::OK);
    } else {
      reactor->Finish({grpc::StatusCode::NOT_FOUND, "no such service here"});
    }
    return reactor;
  }

  grpc::ServerWriteReactor<HealthCheckResponse>* Watch(grpc::CallbackServerContext*,
                                                       const HealthCheckRequest* request) override {
    return WatchReactor::start(health_, is_known(request->service()));
  }

 private:
  bool is_known(const std::string& service) const {
    return service.empty() ||
           std::find(services_.begin(), services_.end(), service) != services_.end();
  }

  Health& health_;
  const std::vector<std::string> services_;
};

}  // namespace

std::unique_ptr<grpc::health::v1::Health::CallbackService> make_health_service(
    Health& health, std::vector<std::string> services) {
  return std::make_unique<HealthService>(health, std::move(services));
}

}  // namespace kvarn
