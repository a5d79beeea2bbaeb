"""`pip install ARGUMENTS` into the Python that runs this: with uv, which is several times faster, or else with pip.

Usage: `.venv/bin/python tools/install.py -r requirements.lock -e .`

uv does not read pip's configuration, which may point to another package index or to the CPU build of torch, so pip's
settings, from its files and from `PIP_*`, are handed on to uv. If one of them has no counterpart here, or uv has no
wheel or fails, pip installs. `UV_TORCH_BACKEND=cpu` (or `auto`, `cu130`, ...), which only uv understands, takes torch
from PyTorch's own index.
"""

from __future__ import annotations

import os
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

UV = "uv==0.13.9"
LOG = Path(sys.prefix) / "install.log"
# DeepSpeed is published as source only. Without its extensions, none of which is used, it needs no compiler.
ENVIRONMENT = os.environ | {"DS_BUILD_OPS": "0"}

COUNTERPARTS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
SWITCHES = {"no-index": ["--no-index"], "pre": ["--prerelease", "allow"]}
VARIABLES = {"cert": "SSL_CERT_FILE", "client-cert": "SSL_CLIENT_CERT", "proxy": "ALL_PROXY"}
INDIFFERENT = {  # no effect on what is installed
    "break-system-packages", "cache-dir", "compile", "config-file", "default-timeout", "disable-pip-version-check",
    "log", "no-cache-dir", "no-color", "no-compile", "no-input", "no-warn-script-location", "progress-bar", "quiet",
    "require-virtualenv", "retries", "root-user-action", "timeout", "verbose",
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Install, with one line on stdout per step, and one on stderr if it fails."""
    LOG.write_text("")
    what = " and ".join("this checkout" if one == "." else one for one in arguments if not one.startswith("-"))
    failure = install_with_uv(arguments, what)
    if failure and "UV_TORCH_BACKEND" not in os.environ:  # which pip would ignore
        say(f"{failure}, so pip installs {what} (some minutes)")
        failure = None if pip(*arguments) else reason()
    if failure:
        print(f"setup: cannot install {what}: {failure} (see {LOG})", file=sys.stderr)
        return 1
    return 0


def install_with_uv(arguments: list[str], what: str) -> str | None:
    """Install with uv; returns why it could not, or None."""
    settings = pip_settings()
    unknown = sorted(settings.keys() - COUNTERPARTS.keys() - SWITCHES.keys() - VARIABLES.keys() - INDIFFERENT)
    if unknown:
        return f"uv has no counterpart of pip's setting {', '.join(unknown)}"
    say(f"installing {UV}")
    if not pip("--only-binary", ":all:", UV):
        return f"no wheel of {UV} found"
    say(f"installing {what} with uv (about a minute; longer for a torch with CUDA)")
    return None if uv(arguments, settings) else f"uv failed ({reason()})"


def pip_settings() -> dict[str, str]:
    """pip's settings by option name; variables override `[install]`, which overrides `[global]`."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in lines:
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in by_section:
            by_section[section][key] = literal_eval(value)
    return by_section["global"] | by_section["install"] | by_section[":env:"]


def uv(arguments: list[str], settings: dict[str, str]) -> bool:
    """Run `uv pip install` with pip's settings and pip's rule: the best version from any index."""
    command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
    command += ["--index-strategy", "unsafe-best-match"]
    for key, option in COUNTERPARTS.items():
        for value in settings.get(key, "").split():
            command += [option, value]
    for key, words in SWITCHES.items():
        if settings.get(key, "").lower() in {"1", "yes", "y", "true", "t", "on"}:
            command += words
    variables = {variable: settings[key] for key, variable in VARIABLES.items() if settings.get(key)}
    return run([*command, *arguments], ENVIRONMENT | variables)


def pip(*arguments: str) -> bool:
    """Install with pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", *arguments]
    return run(command, ENVIRONMENT)


def run(command: list[str], environment: dict[str, str]) -> bool:
    """Run a command, its output into the log; returns whether it succeeded."""
    with LOG.open("a") as log:
        return (
            subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode == 0
        )


def reason() -> str:
    """The last error in the log, with uv's first cause."""
    lines = [line.strip() for line in LOG.read_text().splitlines() if line.strip()] or ["no output"]
    errors = [i for i, line in enumerate(lines) if line.lower().startswith("error:")] or [len(lines) - 1]
    error, *rest = lines[errors[-1] :]
    cause = [line.removeprefix("cause: ") for line in rest[:1] if line.startswith("cause: ")]
    return ": ".join([error.removeprefix("ERROR: ").removeprefix("error: "), *cause])


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
