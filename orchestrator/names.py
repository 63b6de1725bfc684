"""Names and paths that cannot leave the directory they belong to.

Ray accepts `../../x` as a run name; nothing here does. Knows the layout of no directory. Used wherever a name from a
run file, a command line or a trial becomes part of a path.
"""

from __future__ import annotations

import re
from pathlib import Path

from orchestrator.errors import ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_WORDS = "a letter or digit, then up to 63 letters, digits, '.', '_' or '-'"
_NAME = re.compile(NAME_PATTERN.removeprefix("^").removesuffix("$"), re.ASCII)


def is_safe_name(name: str) -> bool:
    """Whether `name` may become one path component; a trailing newline does not pass."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str = "run name") -> str:
    """The name itself.

    Raises:
        ConfigError: it could not be one component of a path.
    """
    if not is_safe_name(name):
        raise ConfigError(f"{what} {name[:80]!a} is not allowed; allowed: {NAME_WORDS}")
    return name


def safe_child(root: Path, *names: str) -> Path:
    """The path below `root` of these names, with every symbolic link on the way refused.

    The result need not exist. `root` itself may be a link: whoever owns the run chose it.

    Raises:
        ConfigError: a name is unsafe, a component is a symbolic link, or the path resolves outside `root`.
    """
    resolved = root.resolve()
    path = resolved
    for name in names:
        path = path / check_name(name, "path component")
        if path.is_symlink():
            raise ConfigError(f"{str(path)!a} is a symbolic link; allowed: a real file or directory inside {root}")
    if not path.resolve().is_relative_to(resolved):
        raise ConfigError(f"{str(path)!a} lies outside {root}; choose a name inside it")
    return path


def run_directory(storage: Path | str, name: str) -> Path:
    """Absolute path of the run directory `name` below `storage`; creates nothing.

    Raises:
        ConfigError: the name is unsafe or the directory is a symbolic link.
    """
    return safe_child(Path(storage), check_name(name))


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at `path` so that a reader sees the old or the new text, never a part.

    Raises:
        OSError: the directory does not exist or cannot be written.
    """
    # The name is fixed: a second writer replaces the first's unfinished file instead of piling up leftovers.
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("x", encoding="utf-8") as stream:
        stream.write(text)
    unfinished.replace(path)
