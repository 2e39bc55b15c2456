"""Where a search's trials are kept, when not in its folder: an Optuna storage named by a URL."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from tekfac.errors import InputError

# Seconds to wait for a server, or for SQLite's file while another process writes it.
WAIT = 30
# Processes that make a data base's tables at once get into each other's way.
ATTEMPTS = 4

# By dialect, what its drivers call the time to wait.
_TIMEOUTS = {"sqlite": "timeout", "postgresql": "connect_timeout", "mysql": "connect_timeout"}


def open_storage(url: str) -> BaseStorage:
    """The storage that a URL names: ``grpc://host:port``, or one of SQLAlchemy's for a data base.

    Raises:
        InputError: if it is none, its driver is not installed, or it does not answer.
    """
    with answering(url):
        parts = urlsplit(url)
        if parts.scheme == "grpc":
            if not (parts.hostname and parts.port):
                raise InputError(f"--storage {shown(url)} must be grpc://HOST:PORT")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                proxy = GrpcStorageProxy(host=parts.hostname, port=parts.port)
            proxy.wait_server_ready(WAIT)
            return proxy
        name = _TIMEOUTS.get(re.split(r"[:+]", url)[0])
        options: dict[str, Any] = {} if name is None else {"connect_args": {name: WAIT}}
        for attempt in range(ATTEMPTS):
            try:
                return RDBStorage(url, engine_kwargs=options)
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                if attempt == ATTEMPTS - 1 or isinstance(error, NoSuchModuleError):
                    raise
                time.sleep(0.5)
        raise AssertionError


@contextmanager
def answering(url: str | None) -> Iterator[None]:
    """Say in a line, for the user, that a storage is at fault; None for one that is no URL.

    Raises:
        InputError: if it is.
    """
    if url is None:
        yield
        return
    try:
        yield
    except ImportError as error:
        cause = error.__cause__ or error
        package = getattr(cause, "name", None) or "a driver"
        raise InputError(
            f"--storage {shown(url)} needs {package}, which is not installed"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ConnectionError) as error:
        raise InputError(f"--storage {shown(url)}: {_reason(error)}") from error
    except Exception as error:
        # grpc's errors, without importing it where it may be missing.
        if not type(error).__module__.startswith("grpc"):
            raise
        raise InputError(f"--storage {shown(url)}: {_reason(error)}") from error


def shown(url: str) -> str:
    """A URL without the name and password in it."""
    return re.sub(r"//[^/@]*@", "//", url)


def _reason(error: BaseException) -> str:
    """What an error's cause says, in a line."""
    cause = error.__cause__ or error
    details = getattr(cause, "details", None)
    text = details() if callable(details) else str(cause)
    return " ".join(str(text).split("\n")[0].split())
