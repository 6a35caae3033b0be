// TLS of the gRPC port: with and without client certificates, and every way to get the files wrong.
// Keys are made here, so that none lies in the repository and none expires.
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <memory>

#include <fmt/format.h>

#include "grpc/health/v1/health.grpc.pb.h"
#include "server/grpc_server.h"
#include "server/grpc_tls.h"
#include "tests/server/serving_fixture.h"
#include "tests/support/tiny_model.h"

namespace kvarn::test {
namespace {

using ::testing::HasSubstr;

struct Pem {
  std::string key, cert;
};

std::string bio_text(BIO* bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio, &data);
  std::string text(data, static_cast<size_t>(size));
  BIO_free(bio);
  return text;
}

// A self-signed certificate for 127.0.0.1, good as its own authority.
Pem make_certificate() {
  EVP_PKEY* key = EVP_EC_gen("P-256");
  X509* cert = X509_new();
  X509_set_version(cert, 2);
  ASN1_INTEGER_set(X509_get_serialNumber(cert), 1);
  X509_gmtime_adj(X509_getm_notBefore(cert), -3600);
  X509_gmtime_adj(X509_getm_notAfter(cert), 3600);
  X509_set_pubkey(cert, key);
  X509_NAME* name = X509_get_subject_name(cert);
  const unsigned char common_name[] = "localhost";
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, common_name, -1, -1, 0);
  X509_set_issuer_name(cert, name);
  for (const auto& [id, value] : {std::pair{NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost"},
                                  std::pair{NID_basic_constraints, "critical,CA:TRUE"}}) {
    X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, nullptr, id, value);
    X509_add_ext(cert, extension, -1);
    X509_EXTENSION_free(extension);
  }
  X509_sign(cert, key, EVP_sha256());
  Pem pem;
  BIO* bio = BIO_new(BIO_s_mem());
  PEM_write_bio_PrivateKey(bio, key, nullptr, nullptr, 0, nullptr, nullptr);
  pem.key = bio_text(bio);
  bio = BIO_new(BIO_s_mem());
  PEM_write_bio_X509(bio, cert);
  pem.cert = bio_text(bio);
  X509_free(cert);
  EVP_PKEY_free(key);
  return pem;
}

class GrpcTlsTest : public ::testing::Test {
 protected:
  GrpcTlsTest() {
    write_file(path("server.key"), server_.key);
    write_file(path("server.crt"), server_.cert);
    write_file(path("client.crt"), client_.cert);
    write_file(path("other.key"), client_.key);
    write_file(path("text"), "no PEM");
    config_.grpc_tls_cert = path("server.crt");
    config_.grpc_tls_key = path("server.key");
  }
  std::string path(const char* name) const { return (dir_.path() / name).string(); }
  std::string error() const {
    const auto credentials = make_grpc_credentials(config_);
    return credentials.is_ok() ? "no error" : credentials.status().message();
  }
  // Status of a health check over TLS.
  grpc::StatusCode check(int port, const grpc::SslCredentialsOptions& options) {
    const auto channel =
        grpc::CreateChannel(fmt::format("127.0.0.1:{}", port), grpc::SslCredentials(options));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    grpc::health::v1::HealthCheckResponse response;
    return grpc::health::v1::Health::NewStub(channel)->Check(&context, {}, &response).error_code();
  }

  TempDir dir_;
  const Pem server_ = make_certificate(), client_ = make_certificate();
  ServerConfig config_;
};

TEST_F(GrpcTlsTest, ServesOverTlsAndNotInPlainText) {
  ServingOptions options;
  options.server.grpc_tls_cert = config_.grpc_tls_cert;
  options.server.grpc_tls_key = config_.grpc_tls_key;
  Serving serving(std::move(options));
  const auto server = start_grpc_server(serving.state).value();
  EXPECT_EQ(check(server->port(),
                  {.pem_root_certs = server_.cert, .pem_private_key = {}, .pem_cert_chain = {}}),
            grpc::OK);
  const auto plain = grpc::CreateChannel(fmt::format("127.0.0.1:{}", server->port()),
                                         grpc::InsecureChannelCredentials());
  grpc::ClientContext context;
  grpc::health::v1::HealthCheckResponse response;
  EXPECT_EQ(grpc::health::v1::Health::NewStub(plain)->Check(&context, {}, &response).error_code(),
            grpc::UNAVAILABLE);
}

TEST_F(GrpcTlsTest, AClientAuthorityDemandsItsCertificate) {
  ServingOptions options;
  options.server.grpc_tls_cert = config_.grpc_tls_cert;
  options.server.grpc_tls_key = config_.grpc_tls_key;
  options.server.grpc_tls_client_ca = path("client.crt");
  Serving serving(std::move(options));
  const auto server = start_grpc_server(serving.state).value();
  EXPECT_EQ(check(server->port(),
                  {.pem_root_certs = server_.cert, .pem_private_key = {}, .pem_cert_chain = {}}),
            grpc::UNAVAILABLE);
  EXPECT_EQ(check(server->port(), {.pem_root_certs = server_.cert,
                                   .pem_private_key = server_.key,
                                   .pem_cert_chain = server_.cert}),
            grpc::UNAVAILABLE);
  EXPECT_EQ(check(server->port(), {.pem_root_certs = server_.cert,
                                   .pem_private_key = client_.key,
                                   .pem_cert_chain = client_.cert}),
            grpc::OK);
}

TEST_F(GrpcTlsTest, AHalfGivenPairNamesTheMissingFlag) {
  config_.grpc_tls_key.clear();
  EXPECT_THAT(error(), HasSubstr("needs --grpc-tls-key"));
  config_ = {};
  config_.grpc_tls_key = path("server.key");
  EXPECT_THAT(error(), HasSubstr("needs --grpc-tls-cert"));
  config_ = {};
  config_.grpc_tls_client_ca = path("client.crt");
  EXPECT_THAT(error(), HasSubstr("needs --grpc-tls-cert"));
}

TEST_F(GrpcTlsTest, ABadFileIsNamedWithItsFlag) {
  config_.grpc_tls_cert = path("absent");
  EXPECT_THAT(error(), testing::AllOf(HasSubstr("--grpc-tls-cert"), HasSubstr("absent")));
  config_.grpc_tls_cert = path("text");
  EXPECT_THAT(error(), testing::AllOf(HasSubstr("--grpc-tls-cert"), HasSubstr("no PEM")));
  config_.grpc_tls_cert = path("server.crt");
  config_.grpc_tls_key = path("text");
  EXPECT_THAT(error(), HasSubstr("--grpc-tls-key"));
  config_.grpc_tls_key = path("other.key");
  EXPECT_THAT(error(), HasSubstr("is not the key of"));
  config_.grpc_tls_key = path("server.key");
  config_.grpc_tls_client_ca = path("text");
  EXPECT_THAT(error(), HasSubstr("--grpc-tls-client-ca"));
}

}  // namespace
}  // namespace kvarn::test
