"""Checkpoints: what is read back is what was saved, or something older that was."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from corrector_jax import cache as caches
from corrector_jax import checkpoint as module
from corrector_jax.checkpoint import Checkpoints, Position
from corrector_jax.sharding import make_placement
from corrector_jax.types import UserError

# Reads that Orbax gave up are collected whenever Python likes, in whichever test that is.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

N, D = 23, 4
MADE_BY = {"pooling": "mean"}


def state(step: int):
    place = make_placement(2)
    rng = np.random.default_rng(step)
    return {
        "params": place.put_everywhere(rng.normal(size=(40, 8)).astype(np.float32)),
        "split": place.put_rows(rng.normal(size=(16, 3)).astype(np.float32)),
        "step": place.put_everywhere(np.int32(step)),
        "ring": None,
    }


def like():
    return jax.tree.map(lambda leaf: jax.numpy.zeros_like(leaf, device=leaf.sharding), state(0))


@functools.cache
def a_cache(step: int) -> caches.TargetCache:
    place = make_placement(2)
    empty = caches.create(N, D, dtype="float32", block_rows=4, place=place)
    rows = np.random.default_rng(step).normal(size=(N, D)).astype(np.float32)
    return caches.write(empty, np.arange(N, dtype=np.int32), rows, step, place)


def save(workdir, steps, *, cached=False, metrics=None, **keep) -> None:
    with Checkpoints.writable(workdir, **keep) as checkpoints:
        for step in steps:
            position = Position(step=step, data="data", metrics=10 * step)
            if cached:
                position.cache = checkpoints.save_cache(a_cache(step), step=step, made_by=MADE_BY)
            position.dev = {str(k): v for k, v in (metrics or {}).items() if k <= step}
            checkpoints.save(state(step), position)


def resume(workdir, *, cached=False, data="data", wanted=None, set_aside=False, step=None):
    said: list[str] = []
    opened = Checkpoints.writable(workdir) if set_aside else Checkpoints.readable(workdir)
    with opened as checkpoints:
        result = checkpoints.resume(
            like() if wanted is None else wanted,
            a_cache(0) if cached else None,
            data=data,
            made_by=MADE_BY,
            step=step,
            say=said.append,
            set_aside=set_aside,
        )
    return *result, said


def same(found, step: int) -> bool:
    expected = state(step)
    return all(
        np.array_equal(np.asarray(found[name]), np.asarray(expected[name]))
        for name in ("params", "split", "step")
    )


def test_state_position_and_cache_come_back(tmp_path):
    save(tmp_path, [3, 6], cached=True)
    found, cache, position, said = resume(tmp_path, cached=True)
    assert same(found, 6)
    assert found["ring"] is None
    assert (position.step, position.metrics) == (6, 60)
    np.testing.assert_array_equal(
        np.asarray(cache.embeddings[:N]), np.asarray(a_cache(6).embeddings[:N])
    )
    assert not said
    assert same(resume(tmp_path, step=3)[0], 3)


@pytest.mark.parametrize("devices", [1, 8])
def test_another_number_of_devices_reads_it(tmp_path, devices):
    save(tmp_path, [3])
    place = make_placement(devices)
    wanted = {
        "params": place.put_everywhere(np.zeros((40, 8), np.float32)),
        "split": place.put_rows(np.zeros((16, 3), np.float32)),
        "step": place.put_everywhere(np.int32(0)),
        "ring": None,
    }
    found = resume(tmp_path, wanted=wanted)[0]
    assert same(found, 3)
    assert found["split"].sharding == place.rows


def files_of(workdir, step: int):
    folders = [workdir / "checkpoints" / str(step), workdir / "cache" / str(step)]
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def test_every_file_truncated_flipped_or_gone_never_restores_anything_else(tmp_path, capfd):
    """Falls back and says so, or reads exactly what was saved (a file that nothing depends on)."""
    save(tmp_path / "good", [3, 6], cached=True)
    files = [path.relative_to(tmp_path / "good") for path in files_of(tmp_path / "good", 6)]
    assert len(files) > 6
    rng = np.random.default_rng(0)
    fell_back = 0
    for number, name in enumerate(files):
        content = (tmp_path / "good" / name).read_bytes()
        broken = [None, content[: len(content) // 2]]
        for flip in rng.integers(0, max(1, 8 * len(content)), 3 if content else 0):
            changed = bytearray(content)
            changed[flip // 8] ^= 1 << flip % 8
            broken.append(bytes(changed))
        for variant, wrong in enumerate(broken):
            workdir = tmp_path / f"{number}-{variant}"
            shutil.copytree(tmp_path / "good", workdir)
            path = workdir / name
            path.unlink() if wrong is None else path.write_bytes(wrong)
            found, cache, position, _ = resume(workdir, cached=True)
            assert position.step in (3, 6), name
            assert same(found, position.step), name
            np.testing.assert_array_equal(
                np.asarray(cache.embeddings[:N]),
                np.asarray(a_cache(position.step).embeddings[:N]),
            )
            # A step whose commit cannot be seen is not listed, and so needs no words.
            if position.step == 3:
                fell_back += 1
            shutil.rmtree(workdir)
    assert fell_back > len(files)
    assert "Traceback" not in capfd.readouterr().err


def break_newest(workdir, step: int) -> None:
    for path in (workdir / "checkpoints" / str(step) / "state").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[:-1])


def test_falling_back_is_loud_and_sets_the_damaged_one_aside(tmp_path):
    save(tmp_path, [3, 6])
    break_newest(tmp_path, 6)
    found, _, position, said = resume(tmp_path)
    assert position.step == 3
    assert same(found, 3)
    assert any("WARNING: the checkpoint of step 6 is damaged" in line for line in said)
    assert not (tmp_path / "damaged").exists()  # reading changes nothing
    said = resume(tmp_path, set_aside=True)[-1]
    assert any("damaged/6-0" in line for line in said)
    save(tmp_path, [6])  # its step can be saved again
    assert resume(tmp_path)[2].step == 6
    assert (tmp_path / "damaged" / "6-0" / "state").is_dir()


def test_without_a_good_one_everything_stays_where_it_is(tmp_path):
    save(tmp_path, [3, 6])
    break_newest(tmp_path, 3)
    break_newest(tmp_path, 6)
    with pytest.raises(UserError, match=r"no checkpoint .* can be used"):
        resume(tmp_path, set_aside=True)
    assert not (tmp_path / "damaged").exists()


def test_a_step_that_is_asked_for_is_not_replaced_by_another(tmp_path):
    save(tmp_path, [3, 6])
    break_newest(tmp_path, 6)
    with pytest.raises(UserError, match="checkpoints/6"):
        resume(tmp_path, step=6)


def test_other_data_and_another_state_are_refused_and_are_no_damage(tmp_path):
    save(tmp_path, [3])
    with pytest.raises(UserError, match="other data"):
        resume(tmp_path, data="other", set_aside=True)
    for key, value, said in (
        ("params", np.zeros((40, 9), np.float32), r"float32\[40, 8\] as params .* \[40, 9\]"),
        ("params", np.zeros((40, 8), np.int32), r"as params but this run has int32"),
        ("extra", np.zeros(2, np.float32), "nothing as extra"),
    ):
        wanted = like() | {key: make_placement(2).put_everywhere(value)}
        with pytest.raises(UserError, match=said.replace(" .* ", ".*")):
            resume(tmp_path, wanted=wanted, set_aside=True)
    assert not (tmp_path / "damaged").exists()


def rewrite_position(workdir, step: int, change) -> None:
    path = workdir / "checkpoints" / str(step) / "position" / "metadata"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def test_other_formats_are_named(tmp_path):
    save(tmp_path, [3])
    rewrite_position(tmp_path, 3, lambda content: content | {"format": 9})
    with pytest.raises(UserError, match="format 9 and this version reads 1"):
        resume(tmp_path)
    # What the first version of this package wrote: the bare position.
    rewrite_position(tmp_path, 3, lambda content: content["position"])
    with pytest.raises(UserError, match="format 0"):
        resume(tmp_path)


def test_a_position_that_was_changed_is_damage(tmp_path):
    save(tmp_path, [3, 6])
    rewrite_position(tmp_path, 6, lambda c: c | {"position": c["position"] | {"metrics": 1}})
    assert resume(tmp_path)[2].step == 3


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep": 1}, [6]),
        ({"keep": 2}, [5, 6]),
        ({"keep": 1, "keep_every": 3}, [3, 6]),
        ({"keep": 1, "keep_best": True}, [2, 6]),
        ({"keep": 1, "keep_best": True, "keep_every": 4}, [2, 4, 6]),
    ],
)
def test_what_is_kept_and_the_snapshots_it_stands_on(tmp_path, keep, left):
    metrics = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2, 5: 0.3, 6: 0.4}
    save(tmp_path, range(1, 7), cached=True, metrics=metrics, **keep)
    with Checkpoints.readable(tmp_path) as checkpoints:
        assert checkpoints.steps() == left
    there = {int(path.name) for path in (tmp_path / "cache").iterdir()}
    assert set(left) <= there <= {*left, 4, 5}  # what is dropped is dropped before the next save
    for step in left:
        assert resume(tmp_path, cached=True, step=step)[2].step == step


def test_the_snapshot_a_new_checkpoint_refers_to_is_never_dropped(tmp_path):
    """A crash may have left a newer snapshot than the one the run goes on with."""
    with Checkpoints.writable(tmp_path, keep=1) as checkpoints:
        first = checkpoints.save_cache(a_cache(0), step=0, made_by=MADE_BY)
        checkpoints.save(state(0), Position(step=0, data="data", cache=first))
        checkpoints.save_cache(a_cache(4), step=4, made_by=MADE_BY)  # of a run that crashed at 5
        second = checkpoints.save_cache(a_cache(2), step=2, made_by=MADE_BY)
        checkpoints.save(state(3), Position(step=3, data="data", cache=second))
    assert resume(tmp_path, cached=True)[2].step == 3


def test_a_read_that_fails_once_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, [3, 6], cached=True)
    plain, failed = module.snapshot.read_manifest, []

    def flaky(folder, **more):
        if not failed:
            failed.append(folder)
            raise module.DamagedError("the store was away")
        return plain(folder, **more)

    monkeypatch.setattr(module.snapshot, "read_manifest", flaky)
    assert resume(tmp_path, cached=True, set_aside=True)[2].step == 6
    assert failed


def test_a_step_that_is_not_there_is_said(tmp_path):
    save(tmp_path, [3, 6])
    with pytest.raises(UserError, match="no checkpoint of step 99: there is 3, 6"):
        resume(tmp_path, step=99)


def test_reading_never_removes_what_another_policy_would_drop(tmp_path):
    save(tmp_path, [1, 2, 3, 4], keep=4)
    before = sorted(path for path in tmp_path.rglob("*"))
    resume(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, [3])
    monkeypatch.setattr(module.paths, "free_bytes", lambda path: 100)
    with pytest.raises(UserError, match=r"GB are free.*the newest there is of step 3"):
        save(tmp_path, [6])
    monkeypatch.undo()
    assert resume(tmp_path)[2].step == 3


def test_a_workdir_that_vanished_is_said(tmp_path):
    with Checkpoints.writable(tmp_path / "run") as checkpoints:
        checkpoints.save(state(1), Position(step=1))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="saving failed"):
            checkpoints.save(state(2), Position(step=2))
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)


def test_an_unfinished_save_is_not_listed_and_swept_away(tmp_path):
    save(tmp_path, [3])
    shutil.copytree(
        tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp-1"
    )
    assert resume(tmp_path)[2].step == 3
    save(tmp_path, [4])
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_check_names_what_is_wrong(tmp_path):
    save(tmp_path, [3], cached=True)
    with Checkpoints.readable(tmp_path) as checkpoints:
        assert all(problem == "" for _, _, problem in checkpoints.check(3))
    rows = next((tmp_path / "cache" / "3").glob("*.safetensors"))
    rows.write_bytes(rows.read_bytes()[:-1] + b"!")
    break_newest(tmp_path, 3)
    with Checkpoints.readable(tmp_path) as checkpoints:
        problems = {what: problem for what, _, problem in checkpoints.check(3)}
    assert problems["state"]
    assert problems[f"cache/3/{rows.name}"]


def test_positions_of_two_runs_share_nothing():
    one, other = Position(), Position()
    one.ledger["refresh"] += 1
    one.skipped.append(3)
    assert dataclasses.asdict(other) == dataclasses.asdict(Position())


def test_a_workdir_on_another_kind_of_store_is_refused():
    from corrector_jax import paths

    with pytest.raises(UserError, match="local disks and to gs:// only"):
        Checkpoints.writable(paths.make("memory://run"))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("leaves"),
        lambda content: content.update(leaves={"params": 4}),
        lambda content: content.update(position=[1]),
        lambda content: content["position"].update(cache=7),
        lambda content: content["position"].update(cache={"step": "x", "sha256": ""}),
        lambda content: content["position"].update(cache={"step": 3, "sha256": None}),
    ],
)
def test_a_position_that_its_digest_fits_and_no_run_wrote_is_damage(tmp_path, change):
    save(tmp_path, [3])
    (path,) = tmp_path.glob("checkpoints/3/position/metadata")
    content = json.loads(path.read_text())
    change(content)
    content.pop("sha256")
    path.write_text(json.dumps(content | {"sha256": module._sha256(content)}))
    with pytest.raises(UserError, match="its position is not what was saved"):
        resume(tmp_path)


def test_a_checkpoint_of_a_later_version_is_refused_and_stays_where_it_is(tmp_path):
    save(tmp_path, [3])
    (path,) = tmp_path.glob("checkpoints/3/position/metadata")
    content = json.loads(path.read_text())
    content["position"]["invented"] = 1
    content.pop("sha256")
    path.write_text(json.dumps(content | {"sha256": module._sha256(content)}))
    with pytest.raises(UserError, match=r"3 has invented, .* use the version of corrector_jax"):
        resume(tmp_path, set_aside=True)
    assert (tmp_path / "checkpoints" / "3").is_dir()


def test_metadata_of_another_kind_is_named_and_can_go(tmp_path):
    save(tmp_path, [3])
    (path,) = tmp_path.glob("checkpoints/3/_CHECKPOINT_METADATA")
    for content in ('"of somebody else"', "[" * 100_000, '{"commit_timestamp_nsecs": 1' + "0" * 40):
        path.write_text(content + "}" * content.startswith("{"))
        with pytest.raises(UserError, match="_CHECKPOINT_METADATA: one of them is not what was"):
            resume(tmp_path)
    path.unlink()
    resume(tmp_path)
