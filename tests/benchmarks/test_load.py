"""Memory that grows is seen, and memory that does not is not."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks import load


@pytest.mark.parametrize(
    ("mib", "flat"),
    [
        ([100.0] * 40, True),
        ([*range(1, 11), *[100.0] * 30], True),  # caches that fill
        ([100 + second for second in range(40)], False),
        ([*[100.0] * 20, *[106.0] * 20], False),
        ([*[100.0] * 20, *[104.0] * 20], True),
    ],
)
def test_flat_is_the_last_quarter_against_the_second(mib, flat):
    found = load.summary(mib)
    assert found["flat"] is flat
    assert found["mib_most"] == max(mib)
    assert len(found["mib_by_quarter"]) == 4


def test_a_process_that_grows_is_watched():
    code = "import time; held = []\nwhile True: held.append(b'x' * 2**24); time.sleep(0.2)"
    process = subprocess.Popen([sys.executable, "-c", code], text=True)
    try:
        with load.watched(process) as mib:
            time.sleep(5.5)
    finally:
        process.kill()
        process.wait()
    assert len(mib) >= 4
    assert mib[-1] > mib[0] + 100
    assert not load.summary(mib)["flat"]


@pytest.mark.slow
def test_a_served_run_is_asked_by_many(finished):
    found = load.serve(finished, seconds=8, clients=3, pause=0.1)
    assert found["wrong"] == []
    assert found["searches"] >= 3
    assert len(found["mib_by_quarter"]) == 4
