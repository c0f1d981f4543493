"""A config file that is watched while the server runs.

In: the file and the overrides of the command line; out: a new `ServerConfig`, once, when the file holds another one.
"""

from __future__ import annotations

from pathlib import Path

from teacher_server.config.file_stamp import stamp_of
from teacher_server.config.server import ServerConfig, load_config
from teacher_server.errors import ServerConfigError


class ConfigFile:
    """One file, looked at again and again.

    Args:
        path: of the YAML file.
        overrides: stay applied to whatever the file says.

    Raises:
        ServerConfigError: it holds no config now.
    """

    def __init__(self, path: Path, overrides: list[str] | None) -> None:
        self.path = path
        self._overrides = overrides
        self._read = self._seen = stamp_of(path)
        self.config = load_config(path, overrides)

    def poll(self) -> ServerConfig | None:
        """The new config, if the file has changed and has been left alone since the last look.

        Raises:
            ServerConfigError: the new content is none; said once for each content.
        """
        before, self._seen = self._seen, stamp_of(self.path)
        if self._seen is None or self._seen == self._read or self._seen != before:
            return None  # missing, known, or still being written
        self._read = self._seen
        try:
            found = load_config(self.path, self._overrides)
        except ServerConfigError as error:
            raise ServerConfigError(f"{error}; the config before stays in force") from None
        if found == self.config:
            return None
        self.config = found
        return found
