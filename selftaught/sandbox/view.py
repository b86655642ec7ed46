"""The file system that programs see: the standard library, shared libraries and an empty /tmp."""

import os
import sys
import sysconfig
from pathlib import Path

import selftaught.sandbox.linux as linux

_STAGE = "/proc"
"""Where the new root is put together: a folder that exists everywhere and contains no sources."""
_DEVICES = ("null", "zero", "random", "urandom")


def make_root() -> None:
    """Make a read-only root with few folders, and leave the former root.

    The process has its own mount namespace, and may mount in it.
    """
    linux.mount("none", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    shown = sources()
    linux.mount("root", _STAGE, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for source in shown:
        target = Path(_STAGE + source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if Path(source).is_symlink():
            target.symlink_to(Path(source).readlink())
        else:
            _bind(source, target)
            linux.make_read_only(str(target))
    for packages in _site_packages():
        if (hidden := Path(_STAGE + packages)).is_dir():
            linux.mount("empty", str(hidden), "tmpfs", linux.MS_RDONLY, "size=4k,mode=755")
    for name in _DEVICES:
        target = Path(_STAGE, "dev", name)
        target.parent.mkdir(exist_ok=True)
        _bind(f"/dev/{name}", target)
    Path(_STAGE, "tmp").mkdir()
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("none", _STAGE, "", flags)
    linux.pivot_root(_STAGE)


def mount_private_tmp(size: int) -> None:
    """Mount an empty /tmp that only this process and its children see."""
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("tmp", "/tmp", "tmpfs", flags, f"size={size},nr_inodes=1000,mode=1777")


def _bind(source: str, target: Path) -> None:
    if Path(source).is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    linux.mount(source, str(target), "", linux.MS_BIND | linux.MS_REC)


def sources() -> list[str]:
    """Return the folders and files of the view, without those inside of others."""
    paths = sysconfig.get_paths()
    candidates = [
        "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/etc/ld.so.cache",
        f"{sys.base_prefix}/lib", paths["stdlib"], paths["platstdlib"],
    ]  # fmt: skip
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in candidates if Path(path).exists()}):  # noqa: PTH100
        if not any(path.startswith(other + "/") for other in found):
            found.append(path)
    return found


def _site_packages() -> set[str]:
    """Return the folders of installed packages of the interpreter, which are hidden."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = {sysconfig.get_paths()["stdlib"]}
    folders |= {f"{prefix}/lib/{version}" for prefix in (sys.base_prefix, "/usr", "/usr/local")}
    folders |= {"/usr/lib/python3"}
    names = ("site-packages", "dist-packages")
    return {os.path.realpath(f"{folder}/{name}") for folder in folders for name in names}
