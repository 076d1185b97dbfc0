from __future__ import annotations

import numpy as np

from liber_runtime.scoring import ScoringClient


def test_scores(client: ScoringClient, running) -> None:
    users = list(running.built.dataset.profiles)[:3]
    items = list(running.built.dataset.items)[:5]
    scores = client.score(users[0], items)
    print(scores)
    assert scores.probability.shape == (5,)
    assert scores.unknown_users == ()
    assert client.score("nobody", [items[0], "nothing"]).unknown_items == ("nothing",)
