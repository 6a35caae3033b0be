// TLS for the gRPC port from --grpc-tls-cert, --grpc-tls-key and --grpc-tls-client-ca. Files are
// read and checked once, at start-up; errors name the flag and the file.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <memory>

#include "kernels/core/status.h"
#include "server/server_config.h"

namespace kvarn {

// Plain text where no certificate is given.
Result<std::shared_ptr<grpc::ServerCredentials>> make_grpc_credentials(const ServerConfig& config);

}  // namespace kvarn
