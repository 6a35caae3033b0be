#include "server/grpc_tls.h"

#include <openssl/pem.h>
#include <openssl/x509.h>

#include <fstream>
#include <sstream>

#include <fmt/format.h>

namespace kvarn {
namespace {

Result<std::string> read_file(const char* flag, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return Status::invalid_argument(fmt::format("--{} '{}' cannot be read", flag, path));
  }
  return text.str();
}

template <typename T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* object) const { kFree(object); }
};
using X509Pointer = std::unique_ptr<X509, Freer<X509, X509_free>>;
using KeyPointer = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY, EVP_PKEY_free>>;
struct BioFree {
  void operator()(BIO* bio) const { BIO_free(bio); }
};

std::unique_ptr<BIO, BioFree> reader(const std::string& text) {
  return std::unique_ptr<BIO, BioFree>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

X509Pointer parse_certificate(const std::string& pem) {
  return X509Pointer(PEM_read_bio_X509(reader(pem).get(), nullptr, nullptr, nullptr));
}

// Never asks a terminal for a passphrase: an encrypted key simply does not parse.
KeyPointer parse_key(const std::string& pem) {
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };
  return KeyPointer(PEM_read_bio_PrivateKey(reader(pem).get(), nullptr, no_passphrase, nullptr));
}

}  // namespace

Result<std::shared_ptr<grpc::ServerCredentials>> make_grpc_credentials(const ServerConfig& config) {
  if (config.grpc_tls_cert.empty() != config.grpc_tls_key.empty()) {
    return Status::invalid_argument(
        fmt::format("--grpc-tls-{} needs --grpc-tls-{}: TLS takes a certificate and its key",
                    config.grpc_tls_cert.empty() ? "key" : "cert",
                    config.grpc_tls_cert.empty() ? "cert" : "key"));
  }
  if (config.grpc_tls_cert.empty()) {
    if (!config.grpc_tls_client_ca.empty()) {
      return Status::invalid_argument(
          "--grpc-tls-client-ca needs --grpc-tls-cert and --grpc-tls-key");
    }
    return grpc::InsecureServerCredentials();
  }
  KVARN_ASSIGN_OR_RETURN(const std::string cert_pem,
                         read_file("grpc-tls-cert", config.grpc_tls_cert));
  KVARN_ASSIGN_OR_RETURN(const std::string key_pem, read_file("grpc-tls-key", config.grpc_tls_key));
  const X509Pointer cert = parse_certificate(cert_pem);
  if (cert == nullptr) {
    return Status::invalid_argument(
        fmt::format("--grpc-tls-cert '{}' holds no PEM certificate", config.grpc_tls_cert));
  }
  const KeyPointer key = parse_key(key_pem);
  if (key == nullptr) {
    return Status::invalid_argument(
        fmt::format("--grpc-tls-key '{}' holds no unencrypted PEM key", config.grpc_tls_key));
  }
  if (X509_check_private_key(cert.get(), key.get()) != 1) {
    return Status::invalid_argument(
        fmt::format("--grpc-tls-key '{}' is not the key of the certificate in --grpc-tls-cert '{}'",
                    config.grpc_tls_key, config.grpc_tls_cert));
  }

  grpc::SslServerCredentialsOptions options(
      config.grpc_tls_client_ca.empty()
          ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
          : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_key_cert_pairs.push_back({key_pem, cert_pem});
  if (!config.grpc_tls_client_ca.empty()) {
    KVARN_ASSIGN_OR_RETURN(options.pem_root_certs,
                           read_file("grpc-tls-client-ca", config.grpc_tls_client_ca));
    if (parse_certificate(options.pem_root_certs) == nullptr) {
      return Status::invalid_argument(fmt::format(
          "--grpc-tls-client-ca '{}' holds no PEM certificate", config.grpc_tls_client_ca));
    }
  }
  return grpc::SslServerCredentials(options);
}

}  // namespace kvarn
