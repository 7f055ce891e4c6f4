"""Pictures of staleness: true to the distances, and text stays text."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from corrector_jax import results, writer
from corrector_jax.report.plots import LIGHT
from corrector_jax.report.staleness import (
    Sample,
    chosen,
    draw_samples,
    draw_softmaxes,
    projection,
    read_samples,
)
from corrector_jax.types import UserError
from tests.report.made_up import HOSTILE


def made(step=9, dim=7, count=11):
    """Fresh rows lie in a plane with the stale ones; the corrected are near the fresh."""
    rng = np.random.default_rng(step)
    plane = np.linalg.qr(rng.normal(size=(dim, 2)))[0].T
    stale, fresh = (rng.normal(size=(count, 2)) * (2, 1) @ plane for _ in range(2))
    rows = (stale, fresh + 0.1, fresh)
    return Sample(step, *(array.astype(np.float32) for array in rows))


def distances(rows):
    return np.linalg.norm(rows[:, None] - rows[None], axis=-1)


def test_what_lies_in_a_plane_keeps_its_distances():
    sample = made()
    (flat,) = projection([sample])
    for full, drawn in zip(sample[1:], flat[1:], strict=True):
        assert drawn.shape == (11, 2)
        np.testing.assert_allclose(distances(drawn), distances(full), atol=1e-4)
    apart = np.linalg.norm(sample.stale - sample.fresh, axis=1)
    np.testing.assert_allclose(np.linalg.norm(flat.stale - flat.fresh, axis=1), apart, atol=1e-4)


def test_every_step_is_drawn_on_the_axes_of_the_last():
    first, last = made(1), made(2)
    both, alone = projection([first, last]), projection([last])
    np.testing.assert_array_equal(both[1].fresh, alone[0].fresh)
    moved = [sample._replace(stale=first.stale) for sample in (first, last)]
    flat = projection(moved)
    np.testing.assert_array_equal(flat[0].stale, flat[1].stale)  # the cache stands still


@pytest.mark.parametrize("dim", [1, 2])
def test_fewer_dimensions_than_a_picture_are_enough(dim):
    rows = np.random.default_rng(0).normal(size=(3, 4, dim)).astype(np.float32)
    (flat,) = projection([Sample(1, *rows)])
    assert flat.stale.shape == (4, 2)
    assert np.isfinite(flat.stale).all()


def test_samples_of_training_that_went_wrong_are_left_out(tmp_path):
    rows = np.ones((3, 8, 4), np.float32)
    (tmp_path / "drift").mkdir()
    for step, value in ((1, 1.0), (2, np.nan)):
        rows[1, 2, 3] = value
        named = dict(zip(("stale", "corrected", "fresh"), rows, strict=True))
        safetensors.numpy.save_file(named, tmp_path / "drift" / f"{step}.safetensors")
    assert [sample.step for sample in read_samples(tmp_path)] == [1]


def test_the_last_step_and_the_first_are_among_those_drawn():
    samples = [made(step) for step in range(1, 8)]
    steps = [sample.step for sample in chosen(samples)]
    assert steps == [1, 3, 5, 7]
    assert [sample.step for sample in chosen(samples[:2])] == [1, 2]
    assert chosen([]) == []


def texts(figure):
    found = [text.get_text() for ax in figure.axes for text in ax.texts]
    return " ".join(found + [ax.get_title(loc="left").strip() for ax in figure.axes])


def test_a_panel_says_the_drift_of_its_step():
    sample = made()
    drift, left = (
        np.square(rows - sample.fresh).sum() / np.square(sample.fresh).sum()
        for rows in (sample.stale, sample.corrected)
    )
    assert drift > 5 * left > 0.01
    assert f"drift {drift:.2f}, corrected {left:.2f}" in texts(draw_samples([sample], LIGHT))
    figure = draw_samples([made(1), made(2)], LIGHT, shown=1)
    assert len(figure.axes) == 1
    assert "step 1" in texts(figure)


def softmaxes(query="a query"):
    heaviest = [{"target": "t", "fresh": 0.5, "stale": 0.1, "corrected": 0.4}]
    missed = {"stale": 0.625, "corrected": 0.11}
    return {"step": 9, "targets": 5, "queries": [
        {"query": query, "missed": missed, "heaviest": heaviest}
    ]}  # fmt: skip


def test_a_panel_says_what_its_query_misses():
    figure = draw_softmaxes(softmaxes("what $x_{$ is"), LIGHT)
    assert "missed: stale 62 %, corrected 11 %" in texts(figure)
    figure.draw_without_rendering()  # no formula begins at the dollar
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sorted(heights) == [0.1, 0.4, 0.5]


@pytest.fixture
def kept(tmp_path, run, page, monkeypatch):
    """A function that renders the made-up run with a sample and a softmax of a query."""

    def render(query="a query"):
        (tmp_path / "drift").mkdir()
        sample = made()._asdict()
        step = sample.pop("step")
        content = safetensors.numpy.save(sample)
        (tmp_path / "drift" / f"{step}.safetensors").write_bytes(content)
        (tmp_path / "softmax.json").write_text(json.dumps(softmaxes(query)))
        return page(run)

    return render


def test_the_page_shows_them_and_a_hostile_query_is_text(kept, tmp_path):
    parsed = kept(HOSTILE)
    assert "script" not in parsed.tags
    assert HOSTILE in parsed.text("th")
    assert "62.5 %" in parsed.texts["td"]
    assert "Where the targets went" in parsed.words
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"targets.png", "softmax.png"}


def test_a_run_without_them_has_no_such_pictures(run, page):
    assert "Where the targets went" not in page(run).words


def test_a_profile_is_drawn_where_there_is_one(run, page, tmp_path):
    record = {"steps": [40, 43], "seconds_per_step": {"sweep of the cache": 0.25, "other": 0.75}}
    (tmp_path / "profile.json").write_text(json.dumps(record))
    assert "means over steps 40 to 42" in page(run).words


def test_a_file_that_is_no_sample_is_refused(tmp_path):
    (tmp_path / "drift").mkdir()
    (tmp_path / "drift" / "5.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"5\.safetensors is not what a run wrote"):
        read_samples(tmp_path)


def test_tensorboard_gets_the_pictures_once_however_often_they_are_made(kept, tmp_path):
    kept()
    for _ in range(2):
        writer.write_pictures(tmp_path, results.pictures(tmp_path, 9))
    (file,) = tmp_path.glob("*.tfevents.*")
    found = {(event.step, value.tag) for event in events(file) for value in event.summary.value}
    assert found == {(9, "report/targets"), (9, "report/softmax"), (9, "drift/targets")}
    (png,) = {
        value.image.encoded_image_string[:8] for e in events(file) for value in e.summary.value
    }
    assert png == b"\x89PNG\r\n\x1a\n"


def events(file):
    """The events of a TensorBoard file: length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = file.read_bytes(), 0
    for _ in itertools.count():
        if at >= len(content):
            return
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


@pytest.mark.parametrize(
    "change",
    [
        {"stale": np.zeros((3, 4), np.float32)},
        {"stale": np.zeros((8, 4), np.int32)},
        dict.fromkeys(("stale", "corrected", "fresh"), np.zeros((0, 4), np.float32)),
        dict.fromkeys(("stale", "corrected", "fresh"), np.zeros(4, np.float32)),
    ],
)
def test_samples_of_another_shape_or_kind_are_refused(tmp_path, change):
    (tmp_path / "drift").mkdir()
    rows = dict.fromkeys(("stale", "corrected", "fresh"), np.zeros((8, 4), np.float32)) | change
    safetensors.numpy.save_file(rows, tmp_path / "drift" / "5.safetensors")
    with pytest.raises(UserError, match=r"5\.safetensors is not what a run wrote"):
        read_samples(tmp_path)


def test_samples_of_several_widths_are_refused(tmp_path):
    (tmp_path / "drift").mkdir()
    for step in (4, 5):
        rows = dict.fromkeys(("stale", "corrected", "fresh"), np.zeros((8, step), np.float32))
        safetensors.numpy.save_file(rows, tmp_path / "drift" / f"{step}.safetensors")
    with pytest.raises(UserError, match="samples of several widths"):
        read_samples(tmp_path)
