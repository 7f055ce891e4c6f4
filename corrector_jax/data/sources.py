"""Reads whichever data source the configuration names."""

from __future__ import annotations

from corrector_jax.data import beir, code_search
from corrector_jax.data.dataset import RetrievalData, render_target, subset
from corrector_jax.types import UserError


def load(
    path: str,
    *,
    target_template: str = "{title} {text}",
    max_targets: int = 0,
    max_queries: int = 0,
) -> RetrievalData:
    """Reads a data source, and cuts it to size where asked.

    Args:
      path: a folder in BEIR layout; '' for the embedded code search data.
      target_template: how a target's text is made of its `{title}` and `{text}`.
      max_targets: keep that many targets, 0 for all; see `subset`.
      max_queries: keep that many queries of dev and of test each, 0 for all.

    Raises:
      UserError: something is wrong with the source or the template, or the cut leaves nothing.
    """
    _check_template(target_template)
    if path:
        data = beir.read(path, target_template=target_template)
    else:
        data = code_search.build(target_template=target_template)
    return subset(data, max_targets=max_targets, max_queries=max_queries)


def _check_template(template: str) -> None:
    try:
        filled = render_target(template, title="", text="some text")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"data.target_template={template!r} cannot be filled in: write a text with {{title}} "
            "and {text} as its only fields."
        ) from error
    if "some text" not in filled:
        raise UserError(f"data.target_template={template!r} drops the text: write {{text}} in it.")
