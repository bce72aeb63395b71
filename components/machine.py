"""What of a machine decides whether and how fast an engine runs; read without loading a library."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import pwd
from pathlib import Path


@functools.cache
def gpu_driver() -> str:
    """Version line of the NVIDIA driver, empty where there is none."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return ""


@functools.cache
def account() -> dict[str, str | int | None]:
    """The operating-system account of this process: `user`, `uid`, `host` and `login`, which sudo keeps."""
    uid = os.getuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = f"uid {uid}"
    try:
        login = os.getlogin()
    except OSError:  # no terminal: a service, a container
        login = None
    return {"user": user, "uid": uid, "host": platform.node(), "login": login}


@functools.cache
def fingerprint() -> str:
    """Processor, usable cores, GPU driver and operating system, with a digest: measurements do not leave it."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    whole = f"{processor}, {cores} cores, {gpu_driver()}, {platform.system()} {platform.release()}, {platform.node()}"
    return f"{processor}, {cores} cores, {platform.system()} ({hashlib.sha256(whole.encode()).hexdigest()[:12]})"
