"""Debian's adbd, adb, mksh, toybox, sshd and rsync, unpacked below the user's cache folder.

Nothing is installed: the packages are downloaded with an apt configuration of our own (main and
backports of one release), checked by apt against Debian's keys, and unpacked with `dpkg -x`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

RELEASE = "bookworm"
PACKAGES = """
    adb/bookworm-backports adbd/bookworm-backports android-libbase/bookworm-backports
    android-libboringssl/bookworm-backports android-libcutils/bookworm-backports
    android-liblog/bookworm-backports android-libziparchive/bookworm-backports
    libprotobuf32 libusb-1.0-0 libbrotli1 libzstd1 liblz4-1 libsystemd0 libgcrypt20
    libgpg-error0 libcap2 liblzma5 libcrypt1 libxxhash0 mksh toybox openssh-client
    openssh-server openssh-sftp-server rsync libpopt0 libwrap0
"""
OLD_CLIENT = "adb/bookworm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SOURCES = "/etc/apt"
SECONDS = 240


class NoPackages(Exception):
    """Debian's packages cannot be had here; the text says why."""


@cache
def unpacked() -> Path:
    """The folder below which the packages lie. Raises NoPackages."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbuild-tests"
    base.mkdir(parents=True, exist_ok=True)
    done = base / f"debian-{RELEASE}-1"
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            work = base / "incomplete"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _fill(work)
            work.rename(done)
    return done


@cache
def one_file(package: str, path: str) -> Path:
    """One file of a package, for a program that needs no other. Raises NoPackages."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbuild-tests"
    base.mkdir(parents=True, exist_ok=True)
    done = base / f"{package.replace('/', '-')}-1"
    with (base / f"{done.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            work = base / f"{done.name}.incomplete"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _check_tools()
            options = _own_apt(work / "apt")
            _run(["apt-get", *options, "update"], work)
            _download(options, [package], work / "new")
            (archive,) = (work / "new").glob("*.deb")
            # Not `dpkg -x`: the package may hold a hundred times what is wanted.
            take = f'dpkg --fsys-tarfile "$1" | tar -x -f - "./{path}"'
            _run(["sh", "-c", take, "sh", str(archive)], work)
            for folder in ("apt", "new"):
                shutil.rmtree(work / folder)
            work.rename(done)
    return done / path


def _check_tools() -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise NoPackages(f"there is no {tool} here")
    if not Path(KEYRING).exists():
        raise NoPackages("Debian's archive keys are not here")


def _fill(work: Path) -> None:
    _check_tools()
    options = _own_apt(work / "apt")
    _run(["apt-get", *options, "update"], work)
    _download(options, PACKAGES.split(), work / "new")
    _download(options, [OLD_CLIENT], work / "old")
    _unpack(work / "new", work / "root")
    _unpack(work / "old", work / "client29")
    for folder in ("apt", "new", "old"):
        shutil.rmtree(work / folder)


def _mirror() -> str:
    """The archive that this machine's own apt reads. Raises NoPackages."""
    files = [Path(SOURCES) / "sources.list", *sorted(Path(SOURCES, "sources.list.d").glob("*"))]
    texts = [path.read_text() for path in files if path.is_file()]
    for text in texts:
        for address in re.findall(r"^(?:URIs:|deb\b[^\n]*?)\s+(\w+://\S+)", text, re.MULTILINE):
            if str(address).rstrip("/").endswith("/debian"):
                return str(address)
    raise NoPackages(f"{SOURCES} names no Debian archive")


def _own_apt(folder: Path) -> list[str]:
    for each in ("lists/partial", "cache/archives/partial"):
        (folder / each).mkdir(parents=True)
    mirror = _mirror()
    suites = (RELEASE, f"{RELEASE}-backports")
    lines = [f"deb [signed-by={KEYRING}] {mirror} {suite} main\n" for suite in suites]
    (folder / "sources.list").write_text("".join(lines))
    (folder / "status").touch()
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def _download(options: list[str], names: list[str], folder: Path) -> None:
    folder.mkdir()
    _run(["apt-get", *options, "download", *names], folder)


def _unpack(folder: Path, into: Path) -> None:
    for package in sorted(folder.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(into)], folder)


def _run(argv: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NoPackages(f"{' '.join(argv[:1])} took more than {SECONDS} s") from error
    if done.returncode:
        raise NoPackages(f"{argv[0]} {argv[-1]}: {done.stderr.strip()[-400:]}")
