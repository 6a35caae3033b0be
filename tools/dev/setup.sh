# Sourced by run.sh and test.sh: installs what a build needs, configures and builds. Not for direct use.
# Everything is checked before anything is installed, so a prepared machine starts at once.

say() { printf '%s\n' "kvarn: $*" >&2; }
die() { say "$*"; exit 1; }

# Boost's headers come under a versioned name, and the version differs between distributions.
boost_package() {
  if apt-cache show libboost1.81-dev >/dev/null 2>&1; then echo libboost1.81-dev
  elif apt-cache show libboost1.83-dev >/dev/null 2>&1; then echo libboost1.83-dev
  else echo libboost-dev; fi
}

build_packages="build-essential cmake ninja-build ccache pkg-config git ca-certificates \
libgrpc++-dev protobuf-compiler-grpc libprotobuf-dev protobuf-compiler \
nlohmann-json3-dev libspdlog-dev libfmt-dev libcli11-dev \
libpcre2-dev libutf8proc-dev libssl-dev libbenchmark-dev libgtest-dev libgmock-dev"
test_packages="python3 python3-venv curl xz-utils"

# missing_packages NAME... prints those that dpkg does not list as installed.
missing_packages() {
  local name
  for name in "$@"; do
    dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$name"
  done
}

# install_packages NAME... : apt, with sudo when not root; elsewhere it prints the list and stops.
install_packages() {
  local missing boost=""
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    if [ -z "${KVARN_SKIP_INSTALL:-}" ]; then
      say "this system has no apt. Install the equivalents of these packages, then set KVARN_SKIP_INSTALL=1:"
      printf '  %s\n' "$@" "libboost-dev (1.81 or newer)" >&2
      exit 1
    fi
    return
  fi
  [ -n "${KVARN_SKIP_INSTALL:-}" ] && return
  missing=$(missing_packages "$@")
  # Any Boost that brings Beast and is new enough will do; ask for one only where the headers are missing.
  if ! grep -qsE '#define BOOST_VERSION 10(8[1-9]|9[0-9])' /usr/include/boost/version.hpp; then boost=1; fi
  [ -z "$missing$boost" ] && return
  local as_root=""
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "not root and no sudo; as root run: apt-get install -y $missing ${boost:+libboost1.81-dev}"
    as_root=sudo
  fi
  say "installing: $missing${boost:+and Boost headers}"
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq >&2 || die "apt-get update failed; is the network up?"
  # shellcheck disable=SC2086,SC2046
  $as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    $missing ${boost:+$(boost_package)} >/tmp/kvarn-apt.log 2>&1 ||
    { tail -n 20 /tmp/kvarn-apt.log >&2; die "apt-get install failed (whole log: /tmp/kvarn-apt.log)"; }
}

# build_preset PRESET TARGET... configures build/PRESET once and builds the targets.
build_preset() {
  local preset=$1 dir="build/$1"
  shift
  if [ ! -f "$dir/build.ninja" ]; then
    say "configuring $dir"
    mkdir -p "$dir"
    # Tests are part of the same build folder: one configuration serves run.sh and test.sh.
    cmake --preset "$preset" >"$dir/configure.log" 2>&1 || { tail -n 30 "$dir/configure.log" >&2; die "cmake failed ($dir/configure.log)"; }
  fi
  if [ "$(ninja -C "$dir" -n "$@" 2>/dev/null | tail -n 1)" != "ninja: no work to do." ]; then
    say "building $* in $dir (the first time takes minutes; later only what changed)"
    if [ -t 2 ]; then ninja -C "$dir" "$@" >&2 || die "the build failed"
    else ninja -C "$dir" --quiet "$@" >&2 || die "the build failed"; fi
  fi
}

# make_venv FOLDER REQUIREMENTS : a pinned Python environment, made again only when the pins change.
make_venv() {
  local dir=$1 requirements=$2 stamp
  stamp=$(sha256sum "$requirements" | cut -d' ' -f1)
  [ -f "$dir/.stamp-$stamp" ] && return 0
  say "preparing $dir from $requirements"
  rm -rf "$dir"
  python3 -m venv "$dir" || return 1
  "$dir/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" || { rm -rf "$dir"; return 1; }
  touch "$dir/.stamp-$stamp"
}
