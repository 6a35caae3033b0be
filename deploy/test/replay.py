#!/usr/bin/env python3
"""Replays the Dockerfile's stages in chroots, for machines without a container engine, and smokes the result.

    sudo python3 deploy/test/replay.py [--target cpu] [--root FOLDER] [--keep]

Understands the instructions our Dockerfile uses and stops at any other. Needs root and debootstrap; the base image
debian:12-slim becomes a minbase Debian 12 from the mirror that apt uses here. The smoke test starts the image's
entry point as its user, waits for its HEALTHCHECK to pass, asks for a chat completion, sends SIGTERM and expects
exit code 0.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def fail(message):
    sys.exit(f"replay: {message}")


def instructions(path):
    """(line number, keyword, rest) of every instruction; comments dropped, continuations joined."""
    pending, start = "", 0
    with open(path) as f:
        for number, line in enumerate(f, 1):
            line = line.rstrip("\n")
            if line.lstrip().startswith("#") or (not line.strip() and not pending):
                continue
            start = start if pending else number
            if line.endswith("\\"):
                pending += line[:-1] + " "
                continue
            keyword, _, rest = (pending + line).strip().partition(" ")
            pending = ""
            yield start, keyword.upper(), rest.strip()


def debian_mirror():
    if os.environ.get("KVARN_DEBIAN_MIRROR"):
        return os.environ["KVARN_DEBIAN_MIRROR"]
    out = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"],
                         capture_output=True, text=True, check=True).stdout
    for line in out.splitlines():
        uri, _, release = line.partition(" ")
        if release in ("bookworm", "stable") and "security" not in uri:
            return uri
    fail("no Debian 12 mirror in apt's sources; set KVARN_DEBIAN_MIRROR")


class Stage:
    """One root file system with the environment, user and folder that later instructions see."""

    def __init__(self, root):
        self.root, self.env, self.user, self.workdir = root, {}, None, "/"
        self.healthcheck, self.entrypoint, self.cmd = None, [], []

    def command(self, argv):
        who = ["--userspec", self.user] if self.user else []
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", **self.env}
        keep = {k: v for k, v in os.environ.items() if k.lower() in ("http_proxy", "https_proxy", "no_proxy")}
        inner = f"cd {shlex.quote(self.workdir)} && exec \"$@\""
        return ["env", "-i", *[f"{k}={v}" for k, v in {**keep, **env}.items()],
                "chroot", *who, self.root, "/bin/sh", "-c", inner, "sh", *argv]

    def run(self, shell_line, **kwargs):
        return subprocess.run(self.command(["/bin/sh", "-c", shell_line]), **kwargs)

    def copy(self, sources, target, base):
        dest = self.root + (target if target.startswith("/") else os.path.join(self.workdir, target))
        for source in sources:
            path = os.path.join(base, source.lstrip("/")) if source != "." else base
            if source == ".":  # the build context: what git would ship, uncommitted changes included
                files = subprocess.run(["git", "-C", base, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                                       capture_output=True, check=True).stdout.split(b"\0")
                for name in filter(None, (n.decode() for n in files)):
                    if os.path.isfile(os.path.join(base, name)):
                        os.makedirs(os.path.dirname(os.path.join(dest, name)), exist_ok=True)
                        shutil.copy2(os.path.join(base, name), os.path.join(dest, name))
            elif os.path.isdir(path):
                shutil.copytree(path, dest, dirs_exist_ok=True)
            else:
                os.makedirs(os.path.dirname(dest), exist_ok=True)
                shutil.copy2(path, dest)


def make_base(root, cache):
    if not os.path.isdir(cache):
        print("replay: bootstrapping a minimal Debian 12", flush=True)
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", cache + ".part", debian_mirror()],
                       check=True, stdout=subprocess.DEVNULL)
        # The base takes this machine's way to its package mirror, as a container build takes its host's network.
        for name in ("/etc/apt/apt.conf.d", "/etc/apt/sources.list.d"):
            if os.path.isdir(name):
                shutil.copytree(name, cache + ".part" + name, dirs_exist_ok=True, symlinks=True)
        for name in ("/etc/apt/sources.list", "/etc/resolv.conf", "/etc/hosts"):
            if os.path.exists(name):
                shutil.copy(name, cache + ".part" + name)
        subprocess.run(["cp", "-a", "/etc/ssl/certs", cache + ".part/etc/ssl/"], check=False)
        os.rename(cache + ".part", cache)
    subprocess.run(["cp", "-a", cache, root], check=True)
    for node in ("proc", "dev"):
        subprocess.run(["mount", "--rbind", f"/{node}", f"{root}/{node}"], check=True)
        subprocess.run(["mount", "--make-rslave", f"{root}/{node}"], check=True)


def stage_name(rest):
    return rest.partition(" AS ")[2]


def needed_stages(dockerfile, target):
    """The target and what it copies from, directly or not."""
    sources, name = {}, None
    for _, keyword, rest in instructions(dockerfile):
        if keyword == "FROM":
            name = stage_name(rest)
            sources[name] = set()
        elif keyword == "COPY" and rest.startswith("--from="):
            sources[name].add(rest.split()[0].removeprefix("--from="))
    if target not in sources:
        fail(f"the Dockerfile has no stage {target}, only {', '.join(sources)}")
    needed, pending = set(), [target]
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += sources[name]
    return needed


def build(dockerfile, target, workspace):
    stages, stage = {}, None
    needed, skipping = needed_stages(dockerfile, target), False
    for number, keyword, rest in instructions(dockerfile):
        if keyword == "FROM":
            skipping = stage_name(rest) not in needed
        if skipping:
            continue
        if keyword == "FROM":
            image, _, name = rest.partition(" AS ")
            if image in stages:
                fail(f"line {number}: a stage based on another stage is not supported here")
            if image != "debian:12-slim":
                fail(f"line {number}: only debian:12-slim can be replayed, got {image}")
            root = os.path.join(workspace, name or f"stage{len(stages)}")
            make_base(root, os.path.join(workspace, "base"))
            stage = stages[name] = Stage(root)
            print(f"replay: stage {name}", flush=True)
        elif keyword == "RUN":
            print(f"replay:   line {number}: RUN {rest[:70]}...", flush=True)
            if stage.run(rest, stdout=subprocess.DEVNULL).returncode != 0:
                fail(f"line {number}: RUN failed")
        elif keyword == "COPY":
            words = shlex.split(rest)
            origin = REPO
            if words[0].startswith("--from="):
                origin = stages[words.pop(0).removeprefix("--from=")].root
            stage.copy(words[:-1], words[-1], origin)
        elif keyword in ("ENV", "ARG"):  # an ARG has its default: nothing is passed here
            key, _, value = rest.partition("=")
            stage.env[key] = value
        elif keyword == "WORKDIR":
            stage.workdir = rest
            os.makedirs(stage.root + rest, exist_ok=True)
        elif keyword == "USER":
            stage.user = rest
        elif keyword == "HEALTHCHECK":
            stage.healthcheck = re.search(r"\bCMD (.*)", rest).group(1)
        elif keyword == "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
        elif keyword == "CMD":
            stage.cmd = json.loads(rest)
        elif keyword not in ("EXPOSE", "STOPSIGNAL"):
            fail(f"line {number}: instruction {keyword} is not known here")
        if stages and list(stages)[-1] == target and keyword == "CMD":
            break
    return stages[target]


def smoke(stage):
    server = subprocess.Popen(stage.command([*stage.entrypoint, *stage.cmd]))
    try:
        for _ in range(120):
            if server.poll() is not None:
                fail(f"the server ended with {server.returncode} before it was healthy")
            if stage.run(stage.healthcheck, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
                break
            time.sleep(0.5)
        else:
            fail("HEALTHCHECK did not pass within 60 s")
        uid = int(re.search(r"^Uid:\s+(\d+)", open(f"/proc/{server.pid}/status").read(), re.M).group(1))
        if uid == 0:
            fail("the server runs as root")
        body = json.dumps({"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32, "temperature": 0})
        request = urllib.request.Request("http://127.0.0.1:8000/v1/chat/completions", body.encode(),
                                         {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        print(f"replay: healthy as uid {uid}; the model says: {answer['choices'][0]['message']['content']!r}")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    if code != 0:
        fail(f"exit code {code} after SIGTERM, expected 0")
    print("replay: SIGTERM drained, exit code 0")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--root", default="/var/tmp/kvarn-replay", help="workspace; the bootstrapped base is kept in it")
    parser.add_argument("--keep", action="store_true", help="leave the stages for a look")
    args = parser.parse_args()
    if os.geteuid() != 0:
        fail("needs root (chroot and bind mounts)")
    if not shutil.which("debootstrap"):
        fail("needs debootstrap: apt-get install debootstrap")
    os.makedirs(args.root, exist_ok=True)
    try:
        smoke(build(os.path.join(REPO, "Dockerfile"), args.target, args.root))
    finally:
        for name in os.listdir(args.root):
            root = os.path.join(args.root, name)
            if name == "base" or not os.path.isdir(root):
                continue
            for node in ("proc", "dev"):
                subprocess.run(["umount", "-R", "-l", f"{root}/{node}"], stderr=subprocess.DEVNULL, check=False)
            if any(os.path.ismount(f"{root}/{node}") for node in ("proc", "dev")):
                fail(f"{root} still has mounts; unmount them by hand, nothing was deleted")
            if not args.keep:
                shutil.rmtree(root, ignore_errors=True)
    print("replay: ok")


if __name__ == "__main__":
    main()
