from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import pytest

from corrector_jax import config as configs
from corrector_jax.strategies import STRATEGIES
from corrector_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]


def changed(**changes: object):
    config = configs.default()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


@pytest.mark.parametrize(
    "path",
    # The synthetic study trains no retriever: benchmarks/synthetic.py reads its settings.
    [path for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "synthetic"],
    ids=lambda path: path.stem,
)
def test_every_shipped_configuration_is_valid(path):
    configs.validate(runpy.run_path(str(path))["get_config"]())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "magic"}, "config.strategy is 'magic': write one of in_batch"),
        ({"cache__dtype": "int3"}, "config.cache.dtype"),
        ({"negatives__draws": 0}, "config.negatives.draws is 0: write 1 or more"),
        ({"model__beta": 0.0}, "config.model.beta is 0.0: write a number above 0"),
        ({"train__warmup": 2000}, "config.train.warmup"),
        ({"strategy": "stale", "corrector__kind": "mlp"}, "config.corrector.kind is 'mlp'"),
        ({"strategy": "refreshed"}, "config.refresh.every is 0"),
        ({"refresh__every": 5, "refresh__policy": "never"}, "config.refresh.every is 5"),
        ({"strategy": "in_batch", "loss__estimator": "single"}, "config.loss.estimator"),
        ({"strategy": "uniform", "loss__estimator": "single"}, "config.loss.estimator"),
        ({"strategy": "oracle", "refresh__every": 5}, "config.refresh.every is 5, which only"),
        ({"strategy": "stale", "refresh__schedule": "0-9:2"}, "config.refresh.schedule is '0-9:2'"),
        ({"strategy": "refreshed", "refresh__schedule": "9"}, "config.refresh.schedule has '9'"),
        ({"refresh__policy": "adaptive"}, "config.refresh.threshold is 0.0: write it"),
        (
            {"strategy": "refreshed", "refresh__threshold": 0.1, "corrector__probe_every": 0},
            "config.corrector.probe_every is 0",
        ),
        (
            {"strategy": "refreshed", "refresh__threshold": 0.1, "refresh__every": 9},
            "config.refresh.threshold is 0.1, which only policy 'adaptive' reads",
        ),
        ({"strategy": "refreshed", "refresh__schedule": "0-9:9"}, "not once in 1000 steps"),
        (
            {"refresh__threshold": 0.1, "corrector__probe_every": 999},
            "smaller config.corrector.probe_every",
        ),
        ({"strategy": "nystrom", "corrector__fit_every": 1000}, "config.corrector.fit_every"),
        ({"negatives__max_relative_score": 1.5}, "config.negatives.max_relative_score is 1.5"),
        ({"strategy": "rolling"}, "config.refresh.rows is 0, but strategy 'rolling'"),
        ({"strategy": "stale", "refresh__rows": 5}, "config.refresh.rows is 5"),
        ({"strategy": "uniform", "negatives__proposal": "topk"}, "config.negatives.proposal"),
        ({"strategy": "streaming", "corrector__kind": "mlp"}, "config.corrector.kind"),
        (
            {"negatives__proposal": "gumbel_topk", "loss__estimator": "balanced"},
            "config.loss.estimator 'balanced' does not fit draws by 'gumbel_topk'",
        ),
        ({"strategy": "in_batch", "eval__corpus": "corrected"}, "no cache"),
        ({"loss__shared": True, "loss__estimator": "weighted"}, "config.loss.shared"),
        ({"corrector__loss": "both"}, "config.corrector.kl_weight"),
        ({"corrector__kl_weight": 0.5}, "config.corrector.kl_weight"),
        ({"corrector__loss": "kl", "loss__estimator": "single"}, "config.corrector.loss"),
        ({"corrector__loss": "kl", "corrector__updates": 2}, "config.corrector.updates"),
        ({"corrector__probe_every": 0}, "config.corrector.probe_every is 0"),
        ({"refresh__every": 100}, "config.corrector.probe_every is 100 but a snapshot"),
        ({"corrector__loss": "kl", "corrector__uniform_rows": 4}, "config.corrector.uniform_rows"),
        ({"strategy": "in_batch", "train__batch_size": 1}, "config.train.batch_size is 1"),
        ({"model__weights": "random", "eval__full_encoder": True}, "config.eval.full_encoder"),
        ({"cache__tile_rows": 8}, "config.cache.tile_rows is 8"),
        ({"negatives__mined": -1}, "config.negatives.mined is -1: write 0 or more"),
        ({"negatives__proposal": "gumbel_topk", "loss__estimator": "single"}, "does not fit draws"),
        ({"loss__estimator": "kool"}, "'kool' does not fit draws by 'two_level'"),
        ({"strategy": "mined", "loss__estimator": "kool"}, "config.loss.estimator is 'kool'"),
        ({"negatives__proposal": "topk", "loss__estimator": "weighted"}, "'topk' gives negatives"),
        ({"negatives__mined": 2, "loss__estimator": "balanced"}, r"config\.negatives\.mined gives"),
        ({"negatives__in_batch": True, "loss__estimator": "single"}, r"negatives\.in_batch gives"),
        ({"strategy": "mined", "negatives__mined": 2}, "as config.negatives.draws"),
        ({"negatives__path": "x.trec"}, "config.negatives.path is 'x.trec' but nothing reads it"),
        ({"strategy": "in_batch", "negatives__in_batch": True}, "as strategy 'in_batch' does"),
        (
            {"negatives__in_batch": True, "loss__shared": True, "loss__estimator": "truncated"},
            "as config.loss.shared does",
        ),
        ({"mine__depth": 40}, r"config.mine.depth ranks 40 .* is 0 \+ 50"),
        ({"mine__max_relative_score": 1.1}, "config.mine.max_relative_score is 1.1"),
        ({"mine__margin": -0.1}, "config.mine.margin is -0.1: write 0.0 or more"),
        ({"negatives__proposal": "scann", "corrector__loss": "kl"}, "candidates and the uniform"),
        ({"negatives__proposal": "scann", "loss__estimator": "kool"}, "'kool' does not fit"),
        ({"negatives__proposal": "scann", "negatives__tail": 0}, "config.negatives.tail is 0"),
        (
            {"negatives__proposal": "scann", "strategy": "streaming"},
            "which strategy 'streaming' does not allow",
        ),
        ({"eval__search": "scann"}, "write it with --mode=evaluate alone"),
        ({"eval__search": "faiss"}, "config.eval.search is 'faiss': write one of exact, scann"),
        (
            {
                "train__steps": 7,
                "train__warmup": 0,
                "train__accumulate": 2,
                "corrector__probe_every": 2,
            },
            "multiple",
        ),
    ],
)
def test_impossible_and_contradictory_values_are_refused_by_key(changes, said):
    with pytest.raises(UserError, match=said) as error:
        configs.validate(changed(**changes))
    assert "\n" not in str(error.value)


def test_a_configuration_that_is_no_run_s_is_refused():
    config = runpy.run_path(str(ROOT / "configs" / "synthetic.py"))["get_config"]()
    with pytest.raises(UserError, match=r"has no cache\.dtype: start from .*default"):
        configs.validate(config)


def test_every_strategy_has_defaults_that_are_valid():
    for name, strategy in STRATEGIES.items():
        needs = {
            "refresh__every": 10 if strategy.refreshes[0] == "every" else 0,
            "refresh__rows": 10 if strategy.cache == "rolling" else 0,
        }
        config = changed(strategy=name, **needs)
        configs.validate(config)
        assert configs.chosen(config)["refresh"] == strategy.refreshes[0]
        for estimator in strategy.estimators:
            proposal = "gumbel_topk" if estimator == "kool" else ""
            configs.validate(
                changed(
                    strategy=name,
                    loss__estimator=estimator,
                    negatives__proposal=proposal,
                    **needs,
                )
            )


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "mined", "negatives__path": "x.trec", "negatives__in_batch": True},
        {"negatives__mined": 1, "negatives__path": "x.trec", "negatives__in_batch": True},
        {"strategy": "in_batch", "negatives__mined": 2},
        {"strategy": "uniform", "negatives__in_batch": True},
        {"negatives__proposal": "gumbel_topk", "negatives__mined": 1},
        {"loss__shared": True, "negatives__mined": 1},
    ],
)
def test_negatives_that_are_mixed_are_summed_as_they_are(changes):
    config = changed(**changes)
    configs.validate(config)
    assert configs.chosen(config)["estimator"] == "truncated"


def test_json_keeps_every_value_and_refuses_unknown_keys():
    config = changed(seed=3, train__steps=77, model__weights="x")
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()
    with pytest.raises(UserError, match="bogus"):
        configs.from_json('{"train": {"bogus": 1}}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": null}', "seed is None: put it back"),  # a ConfigDict takes it for any value
        ('{"seed": true}', "seed is True: put it back"),
        ('{"seed": 1e400}', "seed is inf: put it back"),
        ('{"seed": Infinity}', "seed is inf: put it back"),
        ('{"seed": 99999999999999999999}', "seed is 9+: put it back"),
        ('{"model": {"beta": NaN}}', "NaN is no number"),
        ('{"model": {"weights": "\\ud800"}}', "model.weights is .*: put it back"),
        ('{"model": {"weights": ["x"]}}', r"model.weights is \['x'\]: put it back"),
        ("[" * 100_000, "not what a run wrote"),
        ("[]", "not what a run wrote"),
        (json.dumps({"x" * 5000: 1}), r"has the key 'x+, which"),
    ],
)
def test_json_that_no_run_wrote_is_refused_in_a_sentence(text, said):
    with pytest.raises(UserError, match=said) as error:
        configs.from_json(text)
    assert len(str(error.value)) < 200


def test_json_of_everything_that_a_run_may_be_started_with_is_read_back():
    config = changed(mesh__timeout=float("inf"), train__clip=1e30, model__beta=20)
    config.data.path = os.fsdecode(b"caf\xe9")  # a file's name need not be UTF-8
    config.negatives.path = None  # a ConfigDict takes it for any text
    configs.validate(config)
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()


def test_what_goes_together_by_a_rule_of_today_is_not_asked_of_a_finished_run():
    saved = changed()
    saved.checkpoint.keep_best, saved.eval.every = True, 0
    with pytest.raises(UserError, match="keep_best"):
        configs.validate(saved)
    configs.check_values(saved)
    saved.train.batch_size = 0
    with pytest.raises(UserError, match=r"train\.batch_size is 0: write 1 or more"):
        configs.check_values(saved)


def test_only_keys_that_shape_the_state_are_compared():
    saved = changed(train__steps=100, train__schedule="constant")
    allowed = changed(
        train__steps=200, train__schedule="constant", eval__every=7, log__every=3,
        checkpoint__every=9,
    )  # fmt: skip
    configs.refuse_other_run(allowed, saved, "there")
    for changes in (
        {"train__steps": 50, "train__schedule": "constant"},  # fewer
        {"train__steps": 100, "train__schedule": "linear"},
        {"train__steps": 100, "train__schedule": "constant", "model__beta": 5.0},
    ):
        with pytest.raises(UserError, match="there holds a run with another configuration"):
            configs.refuse_other_run(changed(**changes), saved, "there")
    decaying = changed(train__steps=100)
    with pytest.raises(UserError, match=r"train\.steps"):
        configs.refuse_other_run(changed(train__steps=200), decaying, "there")


def test_what_trains_is_said_with_what_was_left_open():
    config = configs.default()
    shown = (
        "strategy: corrected, negatives by two_level, loss balanced, corrector mlp, refresh never"
    )
    assert configs.in_words(config) == shown
    config.negatives.in_batch = True
    assert ", loss truncated, " in configs.in_words(config)
    config.strategy = "in_batch"
    assert configs.in_words(config) == "strategy: in_batch, negatives by in_batch, loss truncated"
