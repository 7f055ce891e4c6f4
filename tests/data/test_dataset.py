from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from corrector_jax.data import dataset
from corrector_jax.data.dataset import RetrievalData, Split
from corrector_jax.types import UserError


def _split(positives: list[list[int]], name: str) -> Split:
    return Split(
        query_ids=[f"{name}{i}" for i in range(len(positives))],
        texts=[f"{name} text {i}" for i in range(len(positives))],
        positives=[np.array(rows, np.int32) for rows in positives],
        grades=[np.array(rows, np.int32) + 1 for rows in positives],
    )


def _data(num_targets: int = 40, **splits: list[list[int]]) -> RetrievalData:
    return RetrievalData(
        name="toy",
        target_ids=[f"t{i}" for i in range(num_targets)],
        target_texts=[f"target text {i}" for i in range(num_targets)],
        splits={name: _split(positives, name) for name, positives in splits.items()},
    )


def test_known_positives_are_padded_to_the_largest_count_of_their_split():
    data = _data(train=[[3], [1, 4, 7], [2, 9]], dev=[[0]])
    known = data.known_positives("train")
    assert known.dtype == np.int32
    np.testing.assert_array_equal(known, [[3, -1, -1], [1, 4, 7], [2, 9, -1]])
    np.testing.assert_array_equal(data.known_positives("dev"), [[0]])


def test_fingerprint_sees_order_ids_texts_and_their_borders_and_nothing_else():
    data = _data(3, train=[[0]])
    same = dataclasses.replace(data, name="other", splits={})
    assert same.fingerprint() == data.fingerprint()
    changed = [
        dataclasses.replace(data, target_ids=data.target_ids[::-1]),
        dataclasses.replace(data, target_texts=data.target_texts[::-1]),
        dataclasses.replace(data, target_texts=[*data.target_texts[:2], "target text 2 "]),
        dataclasses.replace(
            data,
            target_ids=["t0t", "t1", "t2"],
            target_texts=["arget text 0", *data.target_texts[1:]],
        ),
    ]
    assert len({d.fingerprint() for d in [data, *changed]}) == len(changed) + 1


def test_eval_split_prefers_test_and_falls_back_to_dev():
    both, dev = _data(train=[[0]], dev=[[1]], test=[[2]]), _data(train=[[0]], dev=[[1]])
    assert dataset.eval_split(both) == "test"
    assert dataset.eval_split(both, "dev") == "dev"
    assert dataset.eval_split(dev) == "dev"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("test", "it has: train, dev"), ("train", "write 'auto', 'dev' or 'test'")],
)
def test_eval_split_refuses_what_is_not_there(wanted: str, message: str):
    with pytest.raises(UserError, match=message):
        dataset.eval_split(_data(train=[[0]], dev=[[1]]), wanted)


def test_eval_split_refuses_data_with_train_alone():
    with pytest.raises(UserError, match="it has: train"):
        dataset.eval_split(_data(train=[[0]]))


def test_subset_keeps_texts_with_their_ids_and_judgements_that_still_hold():
    rng = np.random.default_rng(0)
    judged = [sorted(rng.choice(40, size=1 + i % 3, replace=False).tolist()) for i in range(60)]
    data = _data(40, train=judged, test=judged[:20])
    small = dataset.subset(data, max_targets=12)
    assert len(small.target_ids) == 12
    text_of = dict(zip(data.target_ids, data.target_texts, strict=True))
    assert [text_of[i] for i in small.target_ids] == small.target_texts
    assert small.target_ids == [
        i for i in data.target_ids if i in set(small.target_ids)
    ]  # in order
    for name, before in data.splits.items():
        expected = {}
        for query, rows, grades in zip(
            before.query_ids, before.positives, before.grades, strict=True
        ):
            pairs = zip(rows, grades, strict=True)
            left = {data.target_ids[r]: g for r, g in pairs if data.target_ids[r] in text_of}
            left = {i: g for i, g in left.items() if i in small.target_ids}
            if left:
                expected[query] = left
        after = small.splits[name]
        found = {
            query: {small.target_ids[r]: g for r, g in zip(rows, grades, strict=True)}
            for query, rows, grades in zip(
                after.query_ids, after.positives, after.grades, strict=True
            )
        }
        assert found == expected
        assert 0 < len(expected) < len(before.query_ids)
        assert all(rows.dtype == np.int32 and (np.diff(rows) > 0).all() for rows in after.positives)


def test_smaller_subsets_lie_inside_larger_ones_and_do_not_depend_on_order():
    data = _data(40, train=[[i] for i in range(40)])
    small, large = (set(dataset.subset(data, max_targets=n).target_ids) for n in (10, 20))
    assert small < large
    by_hash = sorted(data.target_ids, key=lambda i: hashlib.sha256(i.encode()).digest())
    assert small == set(by_hash[:10])  # whatever the process and the machine
    turned = dataclasses.replace(data, target_ids=data.target_ids[::-1])
    assert set(dataset.subset(turned, max_targets=10).target_ids) == small


def test_max_queries_thins_evaluation_and_leaves_training_whole():
    data = _data(40, **{name: [[i] for i in range(30)] for name in dataset.SPLITS})
    small = dataset.subset(data, max_queries=7)
    assert [len(small.splits[name].query_ids) for name in dataset.SPLITS] == [30, 7, 7]
    assert small.target_ids == data.target_ids
    test = small.splits["test"]
    for query, text, rows in zip(test.query_ids, test.texts, test.positives, strict=True):
        row = int(query.removeprefix("test"))
        assert text == f"test text {row}"
        assert rows.tolist() == [row]
    assert dataset.subset(data) is data


def test_some_train_queries_become_dev_where_there_is_none():
    data = _data(40, train=[[i] for i in range(40)])
    train = data.splits["train"]
    # Each is asked twice, in another case.
    train = train._replace(texts=[f"{'tT'[i % 2]}ext  {i // 2}" for i in range(40)])
    data = dataclasses.replace(data, splits={"train": train})
    few, more = (dataset.hold_out(data, share).splits for share in (0.1, 0.3))
    for splits, count in ((few, 4), (more, 12)):
        kept, held = ({text.lower() for text in splits[name].texts} for name in ("train", "dev"))
        assert not kept & held
        assert len(splits["dev"].texts) == count
        together = sorted(splits["train"].query_ids + splits["dev"].query_ids)
        assert together == sorted(train.query_ids)
        for query, rows in zip(splits["dev"].query_ids, splits["dev"].positives, strict=True):
            assert rows.tolist() == train.positives[train.query_ids.index(query)].tolist()
    assert set(few["dev"].texts) < set(more["dev"].texts)


def test_nothing_is_held_out_where_it_is_not_wanted_or_cannot_be():
    with_dev = _data(40, train=[[i] for i in range(40)], dev=[[1]])
    alone = _data(40, train=[[i] for i in range(40)])
    assert dataset.hold_out(with_dev, 0.1) is with_dev
    assert dataset.hold_out(alone, 0.0) is alone
    with pytest.raises(UserError, match="no two different train queries"):
        dataset.hold_out(_data(40, train=[[0]]), 0.1)
    for data, wanted, hint in (
        (alone, "auto", True),
        (alone, "test", False),
        (with_dev, "test", False),
    ):
        with pytest.raises(UserError, match="has no queries for") as caught:
            dataset.eval_split(data, wanted)
        assert ("holdout=0.1" in str(caught.value)) == hint


def test_subset_refuses_nonsense_and_nothing():
    data = _data(40, train=[[0]])
    with pytest.raises(UserError, match="max_queries is -1"):
        dataset.subset(data, max_queries=-1)
    with pytest.raises(UserError, match="max_targets=1 leaves no query"):
        dataset.subset(_data(40, train=[[int(_not_kept(data))]]), max_targets=1)


def _not_kept(data: RetrievalData) -> int:
    """A row that a subset of one target does not hold."""
    hashes = [dataset.stable_hash(i) for i in data.target_ids]
    return int(np.argmax(hashes))


def test_stable_hash_is_the_same_everywhere():
    # The first 8 bytes of the published sha256 of "abc".
    assert dataset.stable_hash("abc") == 0xBA7816BF8F01CFEA
