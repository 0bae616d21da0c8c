"""A real Cryptoki module for those who have none: SoftHSM2 and throwaway tokens.

The demo and the tests need a token on any machine, without root and without touching
what the user has. So this finds SoftHSM2 or fetches it, and makes tokens in a private
directory that is gone afterwards.

All of it blocks, and none of it is for production. It may know the operating system
and its packages. It must not know the pool: it makes a token, others open it.
"""

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "SoftHSM",
    "SoftHSMUnavailable",
    "ThrowawayToken",
    "TokenDirectory",
    "ensure",
    "find",
    "throwaway_token",
    "token_directory",
]

USER_PIN = "1234"
SO_PIN = "12345678"

ROOT = Path("/")
# Where packages put the module, below the root of the file system or of the cache.
_MODULE_PLACES = (
    "usr/lib/softhsm/libsofthsm2.so",  # Debian, Ubuntu, Arch
    "usr/lib64/pkcs11/libsofthsm2.so",  # Fedora and its relatives
    "usr/lib64/softhsm/libsofthsm2.so",
    "usr/lib/pkcs11/libsofthsm2.so",
    "usr/local/lib/softhsm/libsofthsm2.so",  # from source; Homebrew on Intel
    "opt/homebrew/lib/softhsm/libsofthsm2.so",
)
_UTIL_PLACES = ("usr/bin", "usr/local/bin", "opt/homebrew/bin")
_PACKAGES = ("softhsm2", "libsofthsm2", "softhsm2-common")

_CONFIGURATION = """\
directories.tokendir = {tokens}
objectstore.backend = file
log.level = ERROR
slots.removable = false
"""

# A fetch that gets no answer must end: somebody waits for the demo. A machine that
# has just booted may hold apt's lock for its own updates, for minutes.
_APT = (
    "apt-get",
    "--yes",
    *("-o", "Acquire::http::Timeout=30"),
    *("-o", "Acquire::Retries=2"),
    *("-o", "Acquire::Languages=none"),
    *("-o", "DPkg::Lock::Timeout=300"),
)

_HOW_TO_INSTALL = {
    "debian": "apt-get install softhsm2",
    "fedora": "dnf install softhsm",
    "rhel": "dnf install softhsm",
    "arch": "pacman -S softhsm",
    "suse": "zypper install softhsm",
    "alpine": "apk add softhsm",
    "macos": "brew install softhsm",
}

Tell = Callable[[str], None]


class SoftHSMUnavailable(RuntimeError):
    """SoftHSM2 is not on this machine and could not be fetched.

    The text says how to install it here. ``SOFTHSM2_MODULE`` names a module that
    stands in an unusual place.
    """


@dataclass(frozen=True)
class SoftHSM:
    """SoftHSM2 as found on this machine: its module, and the program that comes along.

    Attributes:
        module: The Cryptoki module.
        util: ``softhsm2-util``.
    """

    module: Path
    util: Path

    def run_util(self, configuration: Path, *arguments: str) -> str:
        """Run ``softhsm2-util`` on the tokens of one configuration; return its output.

        Raises:
            RuntimeError: It failed. The text is what it said, without the arguments:
                they may hold PINs.
        """
        return _run(
            [str(self.util), "--module", str(self.module), *arguments],
            {"SOFTHSM2_CONF": str(configuration)},
        )


@dataclass(frozen=True)
class ThrowawayToken:
    """A token that is gone when its directory is.

    Attributes:
        module: The Cryptoki module that shows it.
        label: Its label.
        serial: Its serial number, as python-pkcs11 gives it.
        user_pin: The user's PIN.
        so_pin: The security officer's PIN.
        directory: The directory with its configuration and its objects.
    """

    module: Path
    label: str
    serial: bytes
    user_pin: str = field(repr=False)
    so_pin: str = field(repr=False)
    directory: Path


class TokenDirectory:
    """A private directory in which SoftHSM2 keeps tokens.

    The module looks for tokens when it is initialised: make them before.
    """

    def __init__(self, softhsm: SoftHSM, path: Path) -> None:
        """Prepare an empty directory.

        Args:
            softhsm: The SoftHSM2 that makes the tokens.
            path: An existing directory, nobody else's.
        """
        self.softhsm = softhsm
        self.path = path
        self.configuration = path / "softhsm2.conf"
        tokens = path / "tokens"
        tokens.mkdir(mode=0o700)
        self.configuration.write_text(_CONFIGURATION.format(tokens=tokens))

    def add_token(
        self, label: str = "demo", *, user_pin: str = USER_PIN, so_pin: str = SO_PIN
    ) -> ThrowawayToken:
        """Make a token. Labels may repeat.

        The PINs are arguments of a program for a moment, so other users of the
        machine can see them. They cannot reach the token.

        Raises:
            RuntimeError: ``softhsm2-util`` refused the label or a PIN.
        """
        words = ["--init-token", "--free", "--label", label]
        words += ["--pin", user_pin, "--so-pin", so_pin]
        made = self.softhsm.run_util(self.configuration, *words)
        # Found by its slot, because a label need not be unique.
        slot = re.search(r"reassigned to slot (\d+)", made)
        shown = self.softhsm.run_util(self.configuration, "--show-slots")
        serials = dict(re.findall(r"(?s)Slot (\d+)\n.*?Serial number: +(\w*)", shown))
        if slot is None or slot[1] not in serials:
            raise RuntimeError(f"softhsm2-util made no token:\n{made}{shown}")
        return ThrowawayToken(
            module=self.softhsm.module,
            label=label,
            serial=serials[slot[1]].encode(),
            user_pin=user_pin,
            so_pin=so_pin,
            directory=self.path,
        )


@contextlib.contextmanager
def token_directory(
    parent: Path | None = None, *, softhsm: SoftHSM | None = None
) -> Iterator[TokenDirectory]:
    """Give a private token directory, seen by this process alone and its children.

    ``SOFTHSM2_CONF`` points to it inside the block. Afterwards the directory is gone
    and the variable is as before.

    Args:
        parent: Where to make it; by default where temporary files go.
        softhsm: Which SoftHSM2; by default the one that `ensure` finds.

    Raises:
        SoftHSMUnavailable: There is none, and none could be fetched.
        RuntimeError: The module is in use in this process. It reads the
            configuration when it is initialised, so it would never see these tokens.
    """
    softhsm = softhsm or ensure()
    if _is_initialised(softhsm.module):
        raise RuntimeError(
            f"{softhsm.module} is in use in this process already: it would not see "
            "the new tokens. Make them first, or finalise the module (close its pools)."
        )
    with (
        tempfile.TemporaryDirectory(prefix="pkcs11-pool-", dir=parent) as path,
        contextlib.ExitStack() as undo,
    ):
        directory = TokenDirectory(softhsm, Path(path))
        undo.callback(_set_variable, "SOFTHSM2_CONF", os.environ.get("SOFTHSM2_CONF"))
        _set_variable("SOFTHSM2_CONF", str(directory.configuration))
        yield directory


@contextlib.contextmanager
def throwaway_token(
    label: str = "demo",
    *,
    user_pin: str = USER_PIN,
    so_pin: str = SO_PIN,
    parent: Path | None = None,
    softhsm: SoftHSM | None = None,
) -> Iterator[ThrowawayToken]:
    """Give a token of its own to the block: see `token_directory` and `add_token`."""
    with token_directory(parent, softhsm=softhsm) as directory:
        yield directory.add_token(label, user_pin=user_pin, so_pin=so_pin)


def find() -> SoftHSM:
    """Return the SoftHSM2 of this machine, without fetching any.

    Raises:
        SoftHSMUnavailable: There is none. The text says what to do.
    """
    named, util = _named_module(), _find_util(ROOT)
    if named is not None and util is not None:
        return SoftHSM(named, util)
    found = _find_below(ROOT)
    if found is None:
        with contextlib.suppress(OSError, RuntimeError):
            # What an earlier call of `ensure` has fetched.
            found = _find_below(_cache() / _system())
    if found is None:
        raise SoftHSMUnavailable(_advice())
    return SoftHSM(named or found.module, found.util)


def ensure(tell: Tell = lambda _: None) -> SoftHSM:
    """Return the SoftHSM2 of this machine; fetch it if there is none.

    In this order: the module that ``SOFTHSM2_MODULE`` names; one that is installed;
    on Debian and its relatives, installed now if we are root, else unpacked into the
    user's cache, where the next call finds it.

    Args:
        tell: Called with one line before each step that takes long.

    Raises:
        SoftHSMUnavailable: None could be had. The text says what to do.
    """
    named = _named_module()
    util = _find_util(ROOT)
    if named is not None and util is not None:
        return SoftHSM(named, util)
    found = _find_below(ROOT)
    if found is None and shutil.which("apt-get") and shutil.which("dpkg"):
        found = _install(tell) if os.geteuid() == 0 else _unpack(tell)
    if found is None:
        raise SoftHSMUnavailable(_advice())
    return SoftHSM(named or found.module, found.util)


def _named_module() -> Path | None:
    """Return the module that the user named; another one must not take its place."""
    named = os.environ.get("SOFTHSM2_MODULE")
    if named is None:
        return None
    if not Path(named).is_file():
        raise SoftHSMUnavailable(f"SOFTHSM2_MODULE names {named}, which is no file.")
    return Path(named)


def _find_below(root: Path) -> SoftHSM | None:
    """Find module and program below a root: the file system's, or an unpacked one."""
    util = _find_util(root)
    for place in _MODULE_PLACES:
        module = root / place
        if util is not None and module.is_file():
            return SoftHSM(module, util)
    return None


def _find_util(root: Path) -> Path | None:
    places = [str(root / place) for place in _UTIL_PLACES]
    if root == ROOT:
        places.append(os.environ.get("PATH", ""))
    found = shutil.which("softhsm2-util", path=os.pathsep.join(places))
    return Path(found) if found else None


def _install(tell: Tell) -> SoftHSM | None:
    """Install Debian's package, as root."""
    tell("Installing softhsm2 with apt-get")
    install = [*_APT, "--no-install-recommends", "install", "softhsm2"]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        # The package lists of this machine may be missing or out of date, and getting
        # new ones takes longer than the installation: only if need be.
        with contextlib.suppress(RuntimeError):
            _run(install, quiet)
            return _find_below(ROOT)
        tell("Getting the package lists first")
        _run([*_APT, "update"])
        _run(install, quiet)
    except RuntimeError as error:
        raise SoftHSMUnavailable(f"{_advice()}\n{error}") from error
    return _find_below(ROOT)


def _unpack(tell: Tell) -> SoftHSM | None:
    """Fetch Debian's packages as an ordinary user and unpack them in the cache.

    What they depend on (OpenSSL, libstdc++) is there wherever apt and Debian's Python
    are.
    """
    try:
        home = _cache() / _system()
        found = _find_below(home)
        if found is not None:
            return found
        home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=home.parent) as scratch:
            _fetch(Path(scratch), tell)
            unpacked = Path(scratch, "unpacked")
            for package in sorted(Path(scratch).glob("*.deb")):
                _run(["dpkg", "-x", str(package), str(unpacked)])
            _move(unpacked, home)
    except (OSError, RuntimeError) as error:
        raise SoftHSMUnavailable(f"{_advice()}\n{error}") from error
    return _find_below(home)


def _move(unpacked: Path, home: Path) -> None:
    """Put the packages in place: in one step, so that nobody ever finds half of them.

    Two runs may do this at once. The second finds the copy of the first, as good as
    its own.
    """
    try:
        unpacked.rename(home)
    except OSError:
        if not home.is_dir():
            raise


def _fetch(scratch: Path, tell: Tell) -> None:
    """Download the packages into a directory.

    Raises:
        RuntimeError: Neither the machine's package lists nor new ones led to them.
    """
    download = ["download", *_PACKAGES]
    tell("Fetching softhsm2 into the user's cache (no root needed)")
    with contextlib.suppress(RuntimeError):
        _run([*_APT, *download], cwd=scratch)
        return
    # The machine's lists are missing or out of date, and only root may renew them:
    # so get lists of our own.
    tell("Getting the package lists first")
    lists, cache = scratch / "lists", scratch / "cache"
    lists.mkdir()
    cache.mkdir()
    own = [*_APT, "-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
    _run([*own, "update"])
    _run([*own, *download], cwd=scratch)


def _cache() -> Path:
    """Return where the unpacked packages are kept, by the XDG rules."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    return base / "pkcs11-pool" / "softhsm2"


def _system() -> str:
    """Name the system that a package is made for: a home may be shared by several."""
    release = _os_release()
    version = release.get("VERSION_ID", "rolling")
    return f"{release.get('ID', 'linux')}-{version}-{platform.machine()}"


def _os_release() -> dict[str, str]:
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {"ID": "macos"} if platform.system() == "Darwin" else {}


def _advice() -> str:
    """Say how to install SoftHSM2 on this system."""
    release = _os_release()
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    known = [_HOW_TO_INSTALL[name] for name in names if name in _HOW_TO_INSTALL]
    how = f"as root: {known[0]}" if known else "with this system's packages"
    return (
        f"SoftHSM2 is not on this machine. Install it ({how}), "
        "or set SOFTHSM2_MODULE to the path of libsofthsm2.so."
    )


def _run(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a program and return what it said; if it fails, raise what it said."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        name = Path(command[0]).name
        raise RuntimeError(f"{name} failed:\n{done.stdout.strip()}")
    return done.stdout


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _is_initialised(module: Path) -> bool:
    """Tell whether somebody in this process has the module initialised."""
    try:
        # Only a module that is loaded already can be in use: this loads none.
        library = ctypes.CDLL(str(module), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    info = ctypes.create_string_buffer(256)  # more than a CK_INFO takes
    ckr_ok = 0
    return bool(library.C_GetInfo(info) == ckr_ok)
