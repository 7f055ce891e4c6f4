from __future__ import annotations

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


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
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


def test_json_keeps_every_value_and_refuses_unknown_keys():
    config = changed(seed=3, train__steps=77, model__weights="x")
    assert configs.from_json(configs.to_json(config)).to_dict() == config.to_dict()
    with pytest.raises(UserError, match="bogus"):
        configs.from_json('{"train": {"bogus": 1}}')


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
