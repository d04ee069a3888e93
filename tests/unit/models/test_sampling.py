from __future__ import annotations

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.generation import row_generators
from hsmn_dist.models.sampling import kept_probabilities, next_tokens

LOGITS = torch.log(torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]))


def test_temperature_divides_the_logits():
    torch.testing.assert_close(kept_probabilities(LOGITS, 2.0), (LOGITS.double() / 2).softmax(-1))


def test_top_k_keeps_the_k_most_probable():
    kept = kept_probabilities(LOGITS, 1.0, top_k=2)
    torch.testing.assert_close(kept, torch.tensor([[5 / 7, 2 / 7, 0, 0, 0]], dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("top_p", "count"), [(0.4, 1), (0.5001, 2), (0.71, 3), (0.99, 5), (1e-9, 1), (1.0, 5)])
def test_top_p_keeps_the_smallest_set_with_that_mass(top_p, count):
    kept = kept_probabilities(LOGITS, 1.0, top_p=top_p)
    assert int((kept > 0).sum()) == count
    assert float(kept.sum()) == pytest.approx(1.0)


def test_greedy_takes_the_most_probable():
    assert next_tokens(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])).tolist() == [1, 0]


def test_frequencies_follow_the_probabilities():
    generators = row_generators(0, range(1))
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[next_tokens(LOGITS, 1.0, generators=generators)] += 1
    torch.testing.assert_close(counts / 4000, LOGITS[0].exp(), atol=0.03, rtol=0)


def test_a_row_draws_the_same_alone_and_in_a_batch():
    logits = torch.randn(4, 50)
    together = next_tokens(logits, 1.0, generators=row_generators(7, range(4)))
    alone = [int(next_tokens(logits[i : i + 1], 1.0, generators=row_generators(7, [i]))) for i in range(4)]
    assert together.tolist() == alone


def test_unusable_logits_and_missing_generators_are_refused():
    with pytest.raises(ModelError, match="NaN"):
        next_tokens(torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(ModelError, match="0 generators for 1 rows"):
        next_tokens(LOGITS, 1.0)
