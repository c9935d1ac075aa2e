"""Runs the real commands of ``tools/`` as subprocesses and reads what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Command:
    """Runs scripts of ``tools/`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Two test processes of one thread each do not slow each other down.
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def popen(self, script: str, *arguments: object, **env: str) -> subprocess.Popen:
        """Start a script."""
        path = ROOT / "tools" / script
        start = ["bash"] if path.suffix == ".sh" else [sys.executable]
        return subprocess.Popen(
            [*start, str(path), *map(str, arguments)],
            cwd=self.folder,
            env={**self.env, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __call__(self, script: str, *arguments: object, status: int = 0, **env: str) -> str:
        """Run a script, check its exit status and return what it wrote."""
        process = self.popen(script, *arguments, **env)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == status, output[-4000:]
        return output


def read_scalars(work_dir: Path) -> dict[int, dict]:
    """The training log of the newest run in a work dir: iteration to its values."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, newest.read_text().splitlines())
    return {line["iter"]: line for line in lines if "loss" in line}


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The newest evaluation in a work dir."""
    return json.loads(max(work_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime).read_text())
