"""Ctrl-C, and a first process that is killed: what is left of the processes that it started."""

import os
import signal
import subprocess
import sys
import time

import pytest

# The real command with its real processes; only what they work at is exchanged for something that takes long.
_SCRIPT = """
import signal, sys, time
from pathlib import Path
from sauce_hooks import cli
from sauce_hooks.evaluation.workers import in_processes
from sauce_hooks.scenes import frontier

folder, jobs = Path(sys.argv[1]), int(sys.argv[2])

def run(*given):
    (folder / "starting").touch()
    units = [0.0, *[60.0] * 8]
    in_processes(time.sleep, units, jobs, start=print, given=("started",), after=(folder / "working").touch)

frontier.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = ["frontier"]
cli.main()
"""


def _group_is_gone(pid, within):
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "jobs", "how", "code"),
    [("starting", 2, signal.SIGINT, 130), ("working", 1, signal.SIGKILL, -signal.SIGKILL)],
)
def test_processes_end_with_the_first(moment, jobs, how, code, tmp_path):
    """Ctrl-C goes to all of them, here while they start; SIGKILL to the first alone, which cannot tell the others."""
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path), str(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / moment).exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        if how == signal.SIGINT:
            time.sleep(0.5)  # they are there, and import
            os.killpg(process.pid, how)
        else:
            process.kill()
        said = process.communicate(timeout=30)[1].decode()
        assert process.returncode == code, said
        assert "Traceback" not in said
        if how == signal.SIGINT:
            assert said.strip().splitlines()[-1].startswith("interrupted; what is finished is kept")
        assert _group_is_gone(process.pid, within=10)
    finally:
        if not _group_is_gone(process.pid, within=0.01):
            os.killpg(process.pid, signal.SIGKILL)
