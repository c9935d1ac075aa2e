"""Fixtures of the tests of tools/."""

from tests.helpers.tool_fixtures import command, demo_data, make_config, mim

__all__ = ["command", "demo_data", "make_config", "mim"]
