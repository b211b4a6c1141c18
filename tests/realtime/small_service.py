"""A service in a process of its own, to be killed: `python small_service.py CONFIG.yaml fake|real`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from scansteer.realtime import config, server


def session_maker(kind: str):
    if kind == "real":
        from scansteer.realtime.session import Session

        return Session
    spec = importlib.util.spec_from_file_location("service_fixtures", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    return fixtures.FakeSession


if __name__ == "__main__":
    server.serve(config.load(config.ServeConfig, Path(sys.argv[1])), session_maker(sys.argv[2]))
