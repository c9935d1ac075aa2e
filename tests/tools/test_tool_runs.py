"""How the tests of the tools run scripts, and share what they leave."""

from pathlib import Path

import pytest

from tests.helpers.sharing import made_once
from tests.helpers.tool_runs import Command

SCRIPT = """
import os, sys
from pathlib import Path
print(__name__, sys.argv, Path.cwd(), sys.path[0], os.environ["TOLD"], "grootvl_mm" in sys.modules, flush=True)
sys.exit("error: as it should")
"""


def test_a_copy_of_a_process_runs_a_script_as_a_fresh_one_does(command: Command, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    fresh, copied = (run(script, "a b", status=1, TOLD="something") for run in (command, command.forked))
    assert copied == fresh
    assert "something False\nerror: as it should" in fresh


def test_things_are_made_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    made = []

    def make(folder: Path) -> Path:
        made.append(folder)
        (folder / "file.txt").touch()
        return folder / "file.txt"

    first, second = (made_once(tmp_path_factory, "once", make) for _ in range(2))
    assert first == second
    assert first.is_file()
    assert len(made) == 1
